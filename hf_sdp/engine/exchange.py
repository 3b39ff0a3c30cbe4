"""The canonical layout: full parameters by their standard names. Moves weights between a plan and it.

One primitive, :func:`exchange`, sends boxes of one full parameter from where they are to where they are wanted;
consolidation, evaluation and loading are three choices of target. Tensor by tensor: no worker ever needs memory for
more than one full parameter besides its own.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn

from ..errors import SDPStateError
from ..model.state import get_state, local_tensor, unwrap
from ..world.agreement import together
from .placement import Box, full_box, intersection, local_box, numel, owned_boxes, view


def exchange(
    sources: list[tuple[int, Box]],
    targets: list[tuple[int, Box]],
    mine: list[tuple[Box, torch.Tensor]],
    wanted: list[tuple[Box, torch.Tensor]],
    like: torch.Tensor,
) -> None:
    """Fill ``wanted`` with the values that the workers' ``mine`` have. Collective over the world (one all-to-all).

    Args:
        sources: every worker's boxes, ``(rank, box)``, the same on all workers; non-overlapping.
        targets: the boxes wanted by every worker, the same on all workers.
        mine: this worker's source boxes in the order of ``sources``, with the tensors that store them.
        wanted: this worker's target boxes in the order of ``targets``, with tensors of these shapes to fill.
        like: any tensor of the right dtype on the device the collective runs on.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    send, send_sizes = [], []
    for target_rank in range(world_size):
        boxes = [box for r, box in targets if r == target_rank]
        pieces = [
            view(tensor, box, part).reshape(-1)
            for box, tensor in mine
            for target in boxes
            if numel(part := intersection(box, target))
        ]
        send += pieces
        send_sizes.append(sum(p.numel() for p in pieces))
    receive: list[tuple[torch.Tensor, Box, Box]] = []
    receive_sizes = []
    for source_rank in range(world_size):
        size = 0
        for box in (box for r, box in sources if r == source_rank):
            for target, tensor in wanted:
                if numel(part := intersection(box, target)):
                    receive.append((tensor, target, part))
                    size += numel(part)
        receive_sizes.append(size)
    output = like.new_empty(sum(receive_sizes))
    dist.all_to_all_single(output, torch.cat(send) if send else like.new_empty(0), receive_sizes, send_sizes)
    offset = 0
    for tensor, target, part in receive:
        into = view(tensor, target, part)
        into.copy_(output[offset : offset + numel(part)].view(into.shape))
        offset += numel(part)
    assert [box for r, box in sources if r == rank] == [box for box, _ in mine]


def owned_tensors(model: nn.Module) -> dict[str, list[tuple[Box, torch.Tensor]]]:
    """Full parameter name -> the boxes this worker owns, with the tensors that store them."""
    state = get_state(model)
    stored: dict[tuple[str, Box], torch.Tensor] = {}
    for local_name, parameter in state.parameters.items():
        held = state.held[local_name]
        stored[held.name, local_box(state, held)] = local_tensor(parameter.detach())
    return {
        name: [(box, stored[name, box]) for rank, box in pieces if rank == state.rank]
        for name, pieces in owned_boxes(state).items()
    }


@torch.no_grad()
def full_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor | None]]:
    """``(name, value)`` of every full parameter, in the order of the plan, tied ones once: on the CPU of rank 0, None on
    the others. Collective: every worker takes them all. No worker ever has more than one of them.

    Raises: SDPStateError before the model is sharded, or when another worker does something else.
    """
    model = unwrap(model)
    state = get_state(model)
    if not state.sharded:
        raise SDPStateError("consolidate and save need a prepared model: no other worker's slices are known yet.")
    if state.roll_call is not None:
        state.roll_call.wait("putting together the full model")
    sources, owned = owned_boxes(state), owned_tensors(model)
    device = local_tensor(next(iter(state.parameters.values())).detach()).device
    for name, shape in state.plan.shapes.items():
        box, like = full_box(shape), torch.empty(0, dtype=state.dtypes[name], device=device)
        wanted = [(box, like.new_empty(shape))] if state.rank == 0 else []
        exchange(sources[name], [(0, box)], owned[name], wanted, like)
        yield name, wanted[0][1].cpu() if wanted else None


def consolidate(
    model: nn.Module, write: Callable[[str, torch.Tensor], None] | None = None
) -> dict[str, torch.Tensor] | None:
    """The full model's state dict on the CPU of rank 0, None on the other workers. Collective.

    Standard Hugging Face names, full shapes, the parameters' dtype; tied parameters share one tensor.

    Args:
        write: called on rank 0 with name and value of one full parameter or buffer after the other (tied ones once);
            none is kept, and nothing is returned.
    Raises: as :func:`full_tensors`; what ``write`` raises, on every worker.
    """
    model = unwrap(model)
    state = get_state(model)
    if state.simulated:
        result = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        if write is None:
            return result
        for name in result.keys() - state.tied.keys():
            write(name, result[name])
        return None
    result, error = {}, None
    for name, tensor in full_tensors(model):
        if state.rank == 0 and error is None:
            try:
                result[name] = tensor if write is None else write(name, tensor)
            except Exception as raised:  # go on taking part: the others wait in the next tensor's collective
                error = raised
    if write is None:
        if state.rank != 0:
            return None
        result.update({alias: result[name] for alias, name in state.tied.items()})
        return {**result, **persistent_buffers(model)}
    with together(state.control_group):
        if error is not None:
            raise error
        if state.rank == 0:
            for name, buffer in persistent_buffers(model).items():
                write(name, buffer)
    return None


def persistent_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """Those that belong into a checkpoint, on the CPU; equal on all workers."""
    # Not through model.state_dict(): FSDP2 frees gathered parameters there, and this is one worker only.
    return {
        f"{prefix}.{name}" if prefix else name: buffer.detach().cpu()
        for prefix, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }
