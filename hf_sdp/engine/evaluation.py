"""Evaluation of the full model while every worker trains a subnetwork of it (forward masking).

No worker holds the full model. A shadow of it, plain FSDP2 over the world, is empty until a forward in eval mode; it
then gets its shards from the canonical layout, if weights have changed since. Every such forward is a collective.
"""

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..model.recomputation import refuse_unsafe_checkpointing
from ..model.state import get_state, local_tensor
from ..plan.placement import Placement
from ..plan.region import Region
from .exchange import Route, find_route, move, owned_tensors
from .fsdp import fully_shard_plainly, reshard
from .sharded import Sharded


class Shadow:
    """The full model in evaluation. Memory: 1/world of the parameters, plus one gathered decoder layer and what is
    outside of them; nothing between a weight update and the next evaluation."""

    def __init__(self, model: nn.Module, sharded: Sharded, device: torch.device, policy: MixedPrecisionPolicy):
        self.source, self.run = model, sharded.run
        self.version: int | None = None
        self.routes: dict[str, Route] = {}  # by full parameter name
        self._is_released = False
        held = sharded.held
        with torch.device("meta"):
            full = held.model_class(copy.deepcopy(held.full_config))
        full.eval().requires_grad_(False)
        full.to(next(model.parameters()).dtype)
        fully_shard_plainly(full, device.type, reshard_after_forward=True, mp_policy=policy)
        full.to_empty(device=device)
        full.tie_weights()  # to_empty makes a tensor for each name
        for name, buffer in model.named_buffers():
            full.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer
        _when_mode_is_set(model, self.release)
        self.full = full
        self.parameters = dict(full.named_parameters())  # the sharded ones, also while a forward has gathered them
        self.release()

    def __call__(self, *args, **kwargs):
        """Forward of the full model. Collective."""
        if self.is_stale:
            self._refresh()
        with torch.no_grad():
            return self.full(*args, **kwargs)

    def release(self) -> None:
        """Free the shards; the next evaluation gets them anew."""
        if self._is_released:
            return
        for parameter in self.parameters.values():
            local_tensor(parameter.detach()).untyped_storage().resize_(0)
        self.version, self._is_released = None, True

    @property
    def is_stale(self) -> bool:
        """Whether the next forward asks all workers for their weights."""
        return self.version != self.run.version

    @torch.no_grad()
    def _refresh(self) -> None:
        held = get_state(self.source).held
        self.version, self._is_released = None, False
        # Plain FSDP2 is the placement of what everyone holds.
        placement = Placement(held.world_size, held.plan.num_subnetworks, "full")
        owned = owned_tensors(self.source)
        for name, parameter in self.parameters.items():
            region = Region.whole(name, held.plan.shapes[name])
            local = local_tensor(parameter.detach())
            padded_rows = -(-region.shape[0] // held.world_size)
            padded_numel = padded_rows * (parameter.numel() // region.shape[0])
            local.untyped_storage().resize_(padded_numel * parameter.element_size())
            if name not in self.routes:
                self.routes[name] = find_route(held.owners[name], list(placement.owned(region, held.plan.everyone)))
            shard = placement.stored(region, held.plan.everyone, held.rank)
            move(self.routes[name], owned[name], [(shard, local)], local)
        self.version = self.run.version


def _when_mode_is_set(model: nn.Module, call: Callable[[], None]) -> None:
    """Let ``model.eval()`` and ``model.train()`` also call ``call``.

    Between two evaluations anybody may have written into parameters: averaged weights that are swapped in, clipping,
    ``load_state_dict``. Torch does not notice what is written through ``.data``.
    """
    set_mode = model.train

    def train(mode: bool = True) -> nn.Module:
        call()
        return set_mode(mode)

    model.train = train  # type: ignore[method-assign]


def guard_forward(model: nn.Module, sharded: Sharded, shadow: Shadow | None) -> None:
    """Check every call of the model before FSDP2's first collective.

    A forward in eval mode waits for all workers, so that one called on some workers only is an error there instead of
    a hang or a wrong result. Training refuses gradient checkpointing that would break or hang.
    """

    held, roll_call = sharded.held, sharded.roll_call
    is_local = held.config.evaluate == "subnetwork" and not held.trains_full_forward and held.config.sharding == "none"

    @torch.compiler.disable
    def check(module, args):
        if module.training:
            refuse_unsafe_checkpointing(module, get_state(module))
        if roll_call is None:
            return
        if module.training:
            roll_call.announce("a forward in training mode")
        elif not is_local:  # else of its subnetwork, which this worker has whole
            is_stale = shadow is not None and shadow.is_stale  # all ask for new weights, or none does
            roll_call.wait("a forward in eval mode", " with new weights" if is_stale else "")

    @torch.compiler.disable
    def free_gathered(module, args, output):
        # After a forward without backward FSDP2 keeps parts gathered. A state_dict() on one worker would free them
        # there only, and the next forward would gather on that worker alone.
        if not torch.is_grad_enabled():
            reshard(module)

    model.register_forward_pre_hook(check, prepend=True)
    model.register_forward_hook(free_gathered)
