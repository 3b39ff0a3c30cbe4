"""The canonical layout: full parameters by their standard names. Moves weights between a plan and it.

One primitive, :func:`exchange`, sends regions of one full parameter from where they are to where they are wanted.
Consolidation and evaluation are two choices of target. It works tensor by tensor: no worker ever needs memory for more
than one full parameter besides its own.
"""

import torch
import torch.distributed as dist
from torch import nn

from ..plan.region import Box, Region, intersection, relative, view
from .sharded import get_sharded

Owned = tuple[int, Region]
"""Rank and region."""
Local = tuple[Region, torch.Tensor]
"""Region and the tensor, of its shape, that has it."""


def exchange(
    sources: list[Owned], targets: list[Owned], mine: list[Local], wanted: list[Local], like: torch.Tensor
) -> None:
    """Fill ``wanted`` with the values that the workers' ``mine`` have. Collective over the world (one all-to-all).

    Args:
        sources: every worker's regions, the same on all workers; non-overlapping.
        targets: the regions wanted by every worker, the same on all workers.
        mine: this worker's source regions in the order of ``sources``.
        wanted: this worker's target regions in the order of ``targets``, with tensors to fill.
        like: any tensor of the right dtype on the device the collective runs on.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    assert [region for r, region in sources if r == rank] == [region for region, _ in mine]
    my_sources, my_targets = _views(mine), _views(wanted)
    boxes_from, boxes_to = _boxes(sources, world_size), _boxes(targets, world_size)
    send, send_sizes = [], []
    for target_rank in range(world_size):
        pieces = [
            view(tensor, relative(common, box)).reshape(-1)
            for box, tensor in my_sources
            for target in boxes_to[target_rank]
            if (common := intersection(box, target)) is not None
        ]
        send += pieces
        send_sizes.append(sum(piece.numel() for piece in pieces))
    receive: list[torch.Tensor] = []
    receive_sizes = []
    for source_rank in range(world_size):
        pieces = [
            view(tensor, relative(common, target))
            for box in boxes_from[source_rank]
            for target, tensor in my_targets
            if (common := intersection(box, target)) is not None
        ]
        receive += pieces
        receive_sizes.append(sum(piece.numel() for piece in pieces))
    output = like.new_empty(sum(receive_sizes))
    dist.all_to_all_single(output, torch.cat(send) if send else like.new_empty(0), receive_sizes, send_sizes)
    for into, values in zip(receive, output.split([piece.numel() for piece in receive]), strict=True):
        into.copy_(values.view(into.shape))


def _views(local: list[Local]) -> list[tuple[Box, torch.Tensor]]:
    return [piece for region, tensor in local for piece in region.views(tensor)]


def _boxes(regions: list[Owned], world_size: int) -> list[list[Box]]:
    """Boxes by rank."""
    result: list[list[Box]] = [[] for _ in range(world_size)]
    for rank, region in regions:
        result[rank] += [piece.full for piece in region.pieces]
    return result


def owned_tensors(model: nn.Module) -> dict[str, list[Local]]:
    """Full parameter name -> the regions this worker owns, in the order of ``Held.owners``, with their tensors."""
    sharded = get_sharded(model, "Moving weights")
    stored = {region: tensor for region, tensor in sharded.stored()}
    return {
        name: [(region, stored[region]) for rank, region in owned if rank == sharded.held.rank]
        for name, owned in sharded.held.owners.items()
    }
