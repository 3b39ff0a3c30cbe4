"""The full model, put together from what all workers store."""

from collections.abc import Callable, Collection, Iterator

import torch
import torch.distributed as dist
from torch import nn

from ..families.adapters import prefix_of
from ..model.packed import quant_states
from ..model.state import find_peft, get_state, local_tensor, unwrap
from ..plan.region import Region
from ..world.agreement import together
from .exchange import exchange, owned_tensors
from .presence import come_to
from .sharded import control_group, get_sharded
from .statistics import average_statistics

_AHEAD = 4  # tensors


@torch.no_grad()
def full_tensors(model: nn.Module, names: Collection[str] | None = None) -> Iterator[tuple[str, torch.Tensor | None]]:
    """``(name, value)`` of every full parameter, or of those of these names, in the order of the plan, tied ones once.

    The value is on the CPU of rank 0, and None on the others. Collective: every worker takes them all. No worker ever
    has more than one of them, and none is further than a few ahead of rank 0: a backend counts a collective's time from
    when it was asked for, and rank 0 may be writing to a slow disk.

    Raises: SDPStateError before the model is sharded, or when another worker does something else.
    """
    sharded = get_sharded(model, "Putting together the full model")
    held = sharded.held
    come_to(model, "putting together the full model")
    average_statistics(model, sharded)
    owned = owned_tensors(model)
    device = local_tensor(next(iter(sharded.parameters.values())).detach()).device
    shapes = held.plan.shapes
    for number, name in enumerate(name for name in shapes if names is None or name in names):
        shape = shapes[name]
        if number % _AHEAD == 0 and sharded.control_group is not None:
            dist.broadcast(torch.tensor(number), src=0, group=sharded.control_group)
        region, like = Region.whole(name, shape), torch.empty(0, dtype=sharded.dtypes[name], device=device)
        wanted = [(region, like.new_empty(shape))] if held.rank == 0 else []
        exchange(held.owners[name], [(0, region)], owned[name], wanted, like)
        yield name, wanted[0][1].cpu() if wanted else None


def consolidate(
    model: nn.Module, write: Callable[[str, torch.Tensor], None] | None = None
) -> dict[str, torch.Tensor] | None:
    """The full model's state dict on the CPU of rank 0, None on the other workers. Collective.

    The names of ``model.state_dict()``, full shapes, the parameters' dtype; tied parameters share one tensor.

    Args:
        write: called on rank 0 with name and value of one full parameter or buffer after the other (tied ones once);
            none is kept, and nothing is returned.
    Raises: as :func:`full_tensors`; what ``write`` raises, on every worker.
    """
    prefix = prefix_of(find_peft(model) or unwrap(model))
    model = unwrap(model)
    held = get_state(model).held
    if held.simulated:
        result = {prefix + name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        if write is None:
            return result
        for name in result.keys() - held.tied.keys():
            write(name, result[name])
        return None
    result, error = {}, None
    for name, tensor in full_tensors(model):
        if held.rank == 0 and error is None:
            assert tensor is not None  # rank 0 gets every value
            try:
                if write is None:
                    result[name] = tensor
                else:
                    write(name, tensor)
            except Exception as raised:  # go on taking part: the others wait in the next tensor's collective
                error = raised
    if write is None:
        if held.rank != 0:
            return None
        result.update({alias: result[name] for alias, name in held.tied.items()})
        return {prefix + name: value for name, value in {**result, **persistent_buffers(model)}.items()}
    with together(control_group(model)):
        if error is not None:
            raise error
        if held.rank == 0:
            for name, buffer in persistent_buffers(model).items():
                write(name, buffer)
    return None


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that belong into a checkpoint, on the CPU; equal on all workers once statistics are averaged."""
    # Not through model.state_dict(): FSDP2 frees gathered parameters there, and this is one worker only.
    buffers = {
        f"{prefix}.{name}" if prefix else name: buffer
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
    return {name: buffer.detach().cpu() for name, buffer in {**buffers, **quant_states(model)}.items()}
