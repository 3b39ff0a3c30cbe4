"""Evaluation of the full model while every worker trains a subnetwork of it (forward masking).

No worker holds the full model. What is cut has a shadow: its full parameters, sharded by FSDP2 over the world. It is
empty until a forward in eval mode; it then gets its shards from the canonical layout, if weights have changed since.
The model's own forward runs, whatever that is. Each module that is cut has the shadow's parameters for the time of its
call. Every such forward is a collective.
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.utils import _pytree as pytree

from ..compat import is_hook_of_fsdp
from ..model.cut import CutModule
from ..model.recomputation import refuse_unsafe_checkpointing
from ..model.state import get_state, local_tensor
from ..plan.placement import Placement
from ..plan.region import Region
from .exchange import Route, find_route, move, owned_tensors
from .fsdp import gathered_modules, reshard
from .sharded import Sharded
from .statistics import average_statistics


class Shadow:
    """The full form of what is cut. Memory: 1/world of its parameters, and two gathered layers during a forward;
    nothing between a weight update and the next evaluation."""

    def __init__(self, model: nn.Module, sharded: Sharded, mesh: DeviceMesh, policy: MixedPrecisionPolicy):
        self.source, self.held, self.run = model, sharded.held, sharded.run
        self.param_dtype = policy.param_dtype
        self.version: int | None = None
        modules: dict[str, nn.Module] = {}
        layers: dict[int, list[nn.Module]] = {}
        for local in self.held.subnetwork.modules:
            for name in local.module.members:
                module = model.get_submodule(name)
                if isinstance(module, CutModule):
                    modules[name] = module.sdp_full
                    layers.setdefault(local.module.layer, []).append(module.sdp_full)
        for name, full in modules.items():
            _set_dtypes(full, {p: sharded.dtypes[f"{name}.{p}"] for p, _ in full.named_parameters()})
        for of_layer in layers.values():
            fully_shard(of_layer if len(of_layer) > 1 else of_layer[0], mesh=mesh, mp_policy=policy)
        for full in modules.values():
            full.to_empty(device=mesh.device_type)
        self.parameters = {f"{n}.{p}": value for n, full in modules.items() for p, value in full.named_parameters()}
        self.groups: list[Any] = [of_layer[0] for of_layer in layers.values()]  # FSDPModules
        self.group_of = {id(full): number for number, of_layer in enumerate(layers.values()) for full in of_layer}
        self.gathered: set[int] = set()
        self.routes: dict[str, Route] = {}  # by full parameter name
        self.release()

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Around a forward of the model."""
        try:
            with torch.no_grad():  # no worker has the full model's gradients
                yield
        finally:
            self._keep_gathered([])

    @contextlib.contextmanager
    def form_of(self, module: CutModule) -> Iterator[None]:
        """Within it, a module that is cut is the full one. Collective."""
        if self.is_stale:
            self._refresh()
        self._gather(self.group_of[id(module.sdp_full)])
        before = []
        for name, full in module.sdp_full.named_modules():
            own = vars(module.get_submodule(name))
            full_own = {"_parameters": full._parameters, **full.sdp_sizes}
            # What is held is not gathered.
            full_own |= {kind: _without_fsdp(own[kind]) for kind in ("_forward_pre_hooks", "_forward_hooks")}
            before.append((own, {attribute: own[attribute] for attribute in full_own}))
            own.update(full_own)
        try:
            yield
        finally:
            for own, held_own in before:
                own.update(held_own)

    def cast(self, arguments: Any) -> Any:
        """The arguments of a module in the dtype that it computes in, as FSDP2 casts them before a forward."""
        dtype = self.param_dtype
        if dtype is None:
            return arguments
        return pytree.tree_map(
            lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf,
            arguments,
            is_leaf=lambda value: not isinstance(value, tuple | list | dict),  # a cache stays the object that it is
        )

    def release(self) -> None:
        """Free the shards; the next evaluation gets them anew."""
        for parameter in self.parameters.values():
            local_tensor(parameter.detach()).untyped_storage().resize_(0)
        self.version = None

    @property
    def is_stale(self) -> bool:
        """Whether the next forward asks all workers for their weights."""
        return self.version != self.run.version

    def _gather(self, number: int) -> None:
        """Gather a layer, and begin to gather the next one."""
        wanted = [n for n in (number, number + 1) if n < len(self.groups)]
        self._keep_gathered(wanted)
        self.groups[number].unshard()
        for ahead in wanted[1:]:
            self.groups[ahead].unshard(async_op=True)
        self.gathered.update(wanted)

    def _keep_gathered(self, numbers: list[int]) -> None:
        for number in self.gathered.difference(numbers):
            self.groups[number].unshard()  # waits for a gather that has begun
            self.groups[number].reshard()
        self.gathered.intersection_update(numbers)

    @torch.no_grad()
    def _refresh(self) -> None:
        held = self.held
        self.version = None
        # Plain FSDP2 is the placement of what everyone holds.
        placement = Placement(held.world_size, held.plan.num_subnetworks, "full")
        owned = owned_tensors(self.source)
        for name, parameter in self.parameters.items():
            region = Region.whole(name, held.plan.shapes[name])
            local = local_tensor(parameter.detach())
            padded_numel = region.shard(0, held.world_size).numel  # that of the first one, the largest
            local.untyped_storage().resize_(padded_numel * parameter.element_size())
            if name not in self.routes:
                self.routes[name] = find_route(held.owners[name], list(placement.owned(region, held.plan.everyone)))
            shard = placement.stored(region, held.plan.everyone, held.rank)
            move(self.routes[name], owned[name], [(shard, local)], local)
        self.version = self.run.version


def _set_dtypes(full: nn.Module, dtypes: dict[str, torch.dtype]) -> None:
    """They may have changed since the model was patched. ``full``: on the meta device."""
    for name, dtype in dtypes.items():
        owner, _, last = name.rpartition(".")
        parameter = torch.empty_like(full.get_parameter(name), dtype=dtype)
        full.get_submodule(owner)._parameters[last] = nn.Parameter(parameter, requires_grad=False)


def _without_fsdp(hooks: OrderedDict) -> OrderedDict:
    return OrderedDict((key, hook) for key, hook in hooks.items() if not is_hook_of_fsdp(hook))


def guard_forward(model: nn.Module, sharded: Sharded, shadow: Shadow | None) -> None:
    """Check every call of the model before FSDP2's first collective.

    A forward in eval mode waits for all workers, so that one called on some workers only is an error there instead of
    a hang or a wrong result. Training refuses gradient checkpointing that would break or hang.
    """

    held, roll_call = sharded.held, sharded.roll_call
    is_local = held.config.evaluate == "subnetwork" and not held.trains_full_forward and held.config.sharding == "none"
    awaited: set[FSDPModule] = set()  # gathered by a forward whose backward comes after this one

    @torch.compiler.disable
    def check(module, args):
        nonlocal awaited
        awaited = gathered_modules(module)
        trains = module.training and sharded.run.computes != "full"
        if trains:
            state = get_state(module)
            refuse_unsafe_checkpointing(module, state)
            if torch.is_grad_enabled():
                sharded.refuse_other_learners()
                if state.schedule is not None:
                    state.schedule.refuse_unfollowed(held.model_name)
            sharded.has_new_statistics = True
        if roll_call is None:
            return
        if trains:
            roll_call.announce("a forward in training mode")
        elif not is_local:  # else of its subnetwork, which this worker has whole
            is_stale = shadow is not None and shadow.is_stale  # all ask for new weights, or none does
            mode = "in training mode without its adapters" if module.training else "in eval mode"
            roll_call.wait(f"a forward {mode}", " with new weights" if is_stale else "")
            average_statistics(module, sharded)

    @torch.compiler.disable
    def free_gathered(module, args, output):
        # After a forward without backward FSDP2 keeps parts gathered. A state_dict() on one worker would free them
        # there only, and the next forward would gather on that worker alone.
        if not torch.is_grad_enabled():
            reshard(module, but=awaited)

    model.register_forward_pre_hook(check, prepend=True)
    model.register_forward_hook(free_gathered)
