"""The engine: SDP is FSDP2 over holder meshes.

Every part is ``fully_shard``-ed over the DeviceMesh of its holders, shared parameters over the world. FSDP2 gathers
the held part, reduces its gradient to the mean over exactly the holders, and keeps each element once.

Order of communication. All workers make all meshes in one order, and run the parts they hold in the plan's order
(backward: in reverse), so collectives of different meshes come in one global order everywhere. A prefetch would break
it: "the next part" differs from worker to worker. Hence no prefetch in backward (see test_order_of_collectives).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..compat import reduce_missing_gradients
from ..errors import SDPStateError
from ..model.changes import recorded
from ..model.state import Held, SDPState, get_state, refuse_changed, unwrap
from ..world.agreement import of_everyone, together
from ..world.groups import control_group
from .debug import watch_collectives
from .evaluation import Shadow, guard_forward
from .frozen import let_inputs_need_gradients
from .fsdp import fsdp_modules, fully_shard_groups, gather_with_root, mixed_precision_policy
from .meshes import make_meshes, world_mesh
from .passed_on import pass_on_views
from .presence import come_to, find_roll_call, open_roll_call
from .sharded import Sharded, find_sharded, set_sharded
from .traffic import Traffic

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def shard(
    model: "PreTrainedModel", device: torch.device, materialize: Callable[[nn.Module], None] | None = None
) -> nn.Module:
    """Shard a patched model over the meshes of its plan, in place. Collective; a second call does nothing.

    Parameters become DTensors; :func:`hf_sdp.engine.optimizer.repoint` moves an optimizer made before over to them.
    Those on the meta device become uninitialized shards on ``device``, or what ``materialize`` makes of them.
    """
    model = unwrap(model)
    state = get_state(model)
    held = state.held
    if held.simulated or find_sharded(model) is not None:
        return model
    if not dist.is_initialized() or dist.get_world_size() != held.world_size:
        raise SDPStateError(
            f"The model was patched for rank {held.rank} of {held.world_size} workers, but the process group has "
            f"{dist.get_world_size() if dist.is_initialized() else 'not been made'}."
        )
    open_roll_call(model)  # of a model that was patched before the process group was there
    come_to(model, "preparing the model")
    on_meta = any(p.is_meta for p in model.parameters())
    with together():
        refuse_changed(model, held)
        if not on_meta:
            model.to(device)
        elif materialize is not None:
            _move_buffers(model, device)
    # Buffers are moved, and stay.
    recording = contextlib.nullcontext() if state.schedule is None else recorded(model, but=("_buffers",))
    with recording as changes:
        _shard(model, state, device, on_meta, materialize)
    if state.schedule is not None and changes is not None:
        state.schedule.changes.append(changes)
    return model


def _shard(model: Any, state: SDPState, device: torch.device, on_meta: bool, materialize: Callable | None) -> None:
    held, run = state.held, state.run
    before = dict(model.named_parameters())
    meshes = make_meshes(held.plan, held.placement, device.type)
    dtypes = _dtypes(held, before, control_group())
    policy = mixed_precision_policy(held.config.param_dtype, held.config.reduce_dtype)
    reshards = held.config.reshard_after_forward
    with together(control_group()):
        fully_shard_groups(model, held.groups, meshes, reshard_after_forward=reshards, mp_policy=policy)
        gather_with_root(model, [modules[0] for modules in held.structure.outer])
        pass_on_views(model, held.groups, held.structure.absent)
        # Nothing is prefetched but a module itself. By the root neither: with inputs_embeds and a tied head FSDP2 takes
        # the worker's last block for what was gathered before it.
        for module in fsdp_modules(model):
            module.set_modules_to_backward_prefetch([module])
        # A norm between two absent blocks, an expert without tokens: other workers have a gradient for it.
        reduce_missing_gradients(model)
        if on_meta and materialize is None:
            model.to_empty(device=device)
            model.tie_weights()  # to_empty makes a tensor for each name
    if materialize is not None:
        materialize(model)
    for name, parameter in before.items():  # of an optimizer made before sharding
        run.replaced.setdefault(parameter, [name])
    parameters = dict(model.named_parameters())
    sharded = Sharded(held, run, parameters, dtypes, Traffic(model), find_roll_call(model))
    set_sharded(model, sharded)
    watch_collectives(sharded)
    model.no_sync = lambda: no_sync(model)
    shadow = None
    if held.evaluates_full:
        shadow = run.full_model = Shadow(model, sharded, world_mesh(device.type), policy)
        sharded.on_change.append(shadow.release)
    run.is_sharded = True
    guard_forward(model, sharded, shadow)
    if not held.trains_full_forward:
        let_inputs_need_gradients(model, held.structure.layers)


def _move_buffers(model: nn.Module, device: torch.device) -> None:
    """Those of a model whose parameters are on the meta device: that are cut, they come from where it was patched."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _dtypes(held: Held, parameters: dict[str, nn.Parameter], group: dist.ProcessGroup | None) -> dict[str, torch.dtype]:
    """Full parameter name -> dtype, also of parameters of which this worker holds nothing. Collective."""
    mine = {held.subnetwork.tensors[name].region.name: p.dtype for name, p in parameters.items()}
    if group is None:
        return dict.fromkeys(held.plan.shapes, next(iter(mine.values()))) | mine
    return {name: dtype for theirs in of_everyone(mine, group) for name, dtype in theirs.items()}


@contextlib.contextmanager
def no_sync(model: FSDPModule) -> Iterator[None]:
    """Accumulate gradients locally. Parts stay gathered between the micro-batches (unless
    ``reshard_after_forward``), so a window of any length gathers and reduces once."""
    model.set_requires_gradient_sync(False)
    try:
        with kept_gathered(model):
            yield
    finally:
        model.set_requires_gradient_sync(True)


@contextlib.contextmanager
def kept_gathered(model: FSDPModule) -> Iterator[None]:
    """Parts stay gathered after a backward within, unless ``reshard_after_forward``: the next forward is with the same
    weights."""
    keep = not get_state(model).held.config.reshard_after_forward
    if keep:
        model.set_reshard_after_backward(False)
    try:
        yield
    finally:
        if keep:
            model.set_reshard_after_backward(True)
