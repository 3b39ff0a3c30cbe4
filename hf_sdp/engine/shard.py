"""The engine: SDP is FSDP2 over holder meshes.

Every part is ``fully_shard``-ed over the DeviceMesh of its holders, shared parameters over the world. FSDP2 gathers
the held part, reduces its gradient to the mean over exactly the holders, and keeps each element once.

Order of communication. All workers make all meshes in one order, and run the parts they hold in the plan's order
(backward: in reverse), so collectives of different meshes come in one global order everywhere. A prefetch would break
it: "the next part" differs from worker to worker. Hence no prefetch in backward (see test_order_of_collectives).
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from ..errors import SDPStateError
from ..families import family_of
from ..model.layers import SharedBias
from ..model.state import SDPState, fsdp_modules, get_state, unwrap
from ..plan.plan import Holders
from ..plan.units import decoder_layers
from ..world.roll_call import RollCall
from .evaluation import Shadow, guard_forward
from .placement import ranks_of
from .traffic import Traffic


def shard(model: nn.Module, device: torch.device) -> nn.Module:
    """Shard a patched model over the meshes of its plan, in place. Collective; a second call does nothing.

    Parameters become DTensors; :func:`hf_sdp.engine.optimizer.repoint` moves an optimizer made before over to them. Those on
    the meta device become uninitialized shards on ``device``.
    """
    model = unwrap(model)
    state = get_state(model)
    if state.sharded or state.simulated:
        return model
    if not dist.is_initialized() or dist.get_world_size() != state.world_size:
        raise SDPStateError(
            f"The model was patched for rank {state.rank} of {state.world_size} workers, but the process group has "
            f"{dist.get_world_size() if dist.is_initialized() else 'not been made'}."
        )
    on_meta = any(p.is_meta for p in model.parameters())
    if not on_meta:
        model.to(device)
    before = dict(model.named_parameters())
    meshes = _make_meshes(state, device.type)
    if dist.get_backend() != "fake":
        state.control_group = dist.new_group(backend="gloo")
        state.roll_call = RollCall(state.rank, state.world_size, state.config.evaluation_timeout_s)
    state.dtypes = _dtypes(state, before)
    groups = _sharding_groups(model, state)
    policy = mixed_precision_policy(state)
    for modules, holders in groups:
        fully_shard(
            modules if len(modules) > 1 else modules[0],
            mesh=meshes[holders],
            reshard_after_forward=state.config.reshard_after_forward,
            mp_policy=policy,
        )
    for module in fsdp_modules(model):
        if module is not model:
            module.set_modules_to_backward_prefetch([module])  # itself: nothing is prefetched
    if on_meta:
        model.to_empty(device=device)
        model.tie_weights()  # to_empty makes a tensor for each name
    state.traffic = Traffic(model)
    _remember_sharded(model, state, before)
    state.parameters = dict(model.named_parameters())
    state.sharded = True
    model.no_sync = lambda: no_sync(model)
    if state.config.evaluate == "full" and not state.trains_full_forward:
        state.shadow = Shadow(model, state, device, policy)
    guard_forward(model, state)
    return model


def mixed_precision_policy(state: SDPState) -> MixedPrecisionPolicy:
    def dtype(name: str | None):
        return None if name is None else getattr(torch, name)

    return MixedPrecisionPolicy(
        param_dtype=dtype(state.config.param_dtype), reduce_dtype=dtype(state.config.reduce_dtype)
    )


def _make_meshes(state: SDPState, device_type: str) -> dict[Holders, DeviceMesh]:
    """One mesh per distinct holder set, made by all workers in sorted order.

    sharding="full": shape (r,), or (R, r) with R replicas of every subnetwork; the shared parameters' mesh is the
    whole world. sharding="none": shape (R*r, 1), replicated only.
    """
    plan = state.plan
    holder_sets = plan.holder_sets if plan.masking == "forward" else (plan.everyone,)
    meshes = {}
    for holders in holder_sets:
        ranks = ranks_of(state, holders)
        if state.config.sharding == "none":
            shape: tuple[int, ...] = (ranks.numel(), 1)
        elif ranks.shape[0] > 1 and holders != plan.everyone:
            shape = tuple(ranks.shape)
        else:
            shape = (ranks.numel(),)
        names = ("replicate", "shard") if len(shape) == 2 else ("shard",)
        meshes[holders] = DeviceMesh(device_type, ranks.reshape(shape), mesh_dim_names=names)
    return meshes


def _sharding_groups(model: nn.Module, state: SDPState) -> list[tuple[list[nn.Module], Holders]]:
    """Modules that are sharded together, bottom-up. The parts of one decoder layer with the same holder set share
    their collectives; so do the embeddings with a tied head. What is left (norms at neuron level) goes to the root."""
    everyone = state.plan.everyone
    groups: list[tuple[list[nn.Module], Holders]] = []
    for module in model.modules():
        if isinstance(module, SharedBias):
            groups.append(([module], everyone))
    if state.local_parts and not state.plan.is_full:
        by_layer: dict[tuple[int, Holders], list[nn.Module]] = {}
        for local in state.local_parts:
            by_layer.setdefault((local.part.layer, local.part.holders), []).extend(local.modules)
        groups += [(modules, holders) for (_, holders), modules in by_layer.items()]
    else:  # every worker has everything: plain FSDP2, layer by layer
        _, layers = decoder_layers(model, family_of(model.config))
        groups += [([layer], everyone) for layer in layers]
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is embeddings.weight:
        groups.append(([embeddings, head], everyone))
    else:
        groups.append(([embeddings], everyone))
        if head is not None:
            groups.append(([head], everyone))
    return [*groups, ([model], everyone)]


def _dtypes(state: SDPState, parameters: dict[str, nn.Parameter]) -> dict[str, torch.dtype]:
    """Full parameter name -> dtype, also of parameters of which this worker holds nothing. Collective."""
    mine = {state.held[name].name: p.dtype for name, p in parameters.items()}
    if state.control_group is None:
        return dict.fromkeys(state.plan.shapes, next(iter(mine.values()))) | mine
    everyone: list = [None] * state.world_size
    dist.all_gather_object(everyone, mine, group=state.control_group)
    return {name: dtype for theirs in everyone for name, dtype in theirs.items()}


def _remember_sharded(model: nn.Module, state: SDPState, before: dict[str, nn.Parameter]) -> None:
    """Optimizers made before sharding refer to the local parameters, or to the full ones from before patching."""
    for name, parameter in before.items():
        if parameter not in state.replaced:
            state.replaced[parameter] = [name]


@contextlib.contextmanager
def no_sync(model: nn.Module) -> Iterator[None]:
    """Accumulate gradients locally. Parts stay gathered between the micro-batches (unless
    ``reshard_after_forward``), so a window of any length gathers and reduces once."""
    keep = not get_state(model).config.reshard_after_forward
    model.set_requires_gradient_sync(False)
    if keep:
        model.set_reshard_after_backward(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
        if keep:
            model.set_reshard_after_backward(True)
