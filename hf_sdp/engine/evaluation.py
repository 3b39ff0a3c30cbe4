"""Evaluation of the full model while every worker trains a subnetwork of it (forward masking).

No worker holds the full model. A shadow of it, plain FSDP2 over the world, is empty until a forward in eval mode; it
then gets its shards from the canonical layout, if weights have changed since. Every such forward is a collective.
"""

import copy

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ..families import family_of
from ..model.methods import refuse_unsafe_checkpointing
from ..model.state import SDPState, local_tensor, reshard
from ..plan.units import decoder_layers
from .exchange import exchange, owned_tensors
from .placement import full_box, numel, owned_boxes, shard_box


class Shadow:
    """The full model in evaluation. Memory: 1/world of the parameters, plus one gathered decoder layer and what is
    outside of them; nothing between a weight update and the next evaluation."""

    def __init__(self, model: nn.Module, state: SDPState, device: torch.device, policy: MixedPrecisionPolicy):
        self.source, self.state, self.version = model, state, None
        with torch.device("meta"):
            full = state.model_class(copy.deepcopy(state.full_config))
        full.eval().requires_grad_(False)
        full.to(next(model.parameters()).dtype)
        mesh = DeviceMesh(device.type, torch.arange(state.world_size))
        _, layers = decoder_layers(full, family_of(full.config))
        for module in (*layers, full):
            fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)
        full.to_empty(device=device)
        full.tie_weights()  # to_empty makes a tensor for each name
        for name, buffer in model.named_buffers():
            full.get_submodule(name.rpartition(".")[0])._buffers[name.rpartition(".")[2]] = buffer
        self.full = full
        self.parameters = dict(full.named_parameters())  # the sharded ones, also while a forward has gathered them
        self.release()

    def __call__(self, *args, **kwargs):
        """Forward of the full model. Collective."""
        if self.version != self.state.version:
            self._refresh()
        with torch.no_grad():
            return self.full(*args, **kwargs)

    def release(self) -> None:
        """Free the shards; the next evaluation gets them anew."""
        for parameter in self.parameters.values():
            local_tensor(parameter.detach()).untyped_storage().resize_(0)
        self.version = None

    @torch.no_grad()
    def _refresh(self) -> None:
        world_size = self.state.world_size
        sources, owned = owned_boxes(self.state), owned_tensors(self.source)
        for name, parameter in self.parameters.items():
            parameter_shape = self.state.plan.shapes[name]
            local = local_tensor(parameter.detach())
            storage = local.untyped_storage()
            padded_rows = -(-parameter_shape[0] // world_size)
            storage.resize_(padded_rows * (parameter.numel() // parameter_shape[0]) * parameter.element_size())
            targets = [(rank, shard_box(full_box(parameter_shape), rank, world_size)) for rank in range(world_size)]
            targets = [(rank, box) for rank, box in targets if numel(box)]
            wanted = [(box, local) for rank, box in targets if rank == self.state.rank]
            exchange(sources[name], targets, owned[name], wanted, local)
        self.version = self.state.version


def guard_forward(model: nn.Module, state: SDPState) -> None:
    """Check every call of the model before FSDP2's first collective.

    A forward in eval mode waits for all workers, so that one called on some workers only is an error there instead of
    a hang or a wrong result. Training refuses gradient checkpointing that would break or hang.
    """

    @torch.compiler.disable
    def check(module, args):
        if module.training:
            refuse_unsafe_checkpointing(module, state)
        if state.roll_call is None:
            return
        if module.training:
            state.roll_call.announce("a forward in training mode")
        elif state.shadow is None and not state.trains_full_forward and state.config.sharding == "none":
            return  # of its subnetwork, which this worker has whole
        else:
            state.roll_call.wait("a forward in eval mode")

    @torch.compiler.disable
    def free_gathered(module, args, output):
        # After a forward without backward FSDP2 keeps parts gathered. A state_dict() on one worker would free them
        # there only, and the next forward would gather on that worker alone.
        if not torch.is_grad_enabled():
            reshard(module)

    model.register_forward_pre_hook(check, prepend=True)
    model.register_forward_hook(free_gathered)
