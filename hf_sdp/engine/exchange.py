"""The canonical layout: full parameters by their standard names. Moves weights between a plan and it.

One primitive, :func:`move`, sends regions of one full parameter from where they are to where they are wanted.
Consolidation, evaluation and the next phase of a schedule differ in their targets. It works tensor by tensor: no worker
ever needs memory for more than one full parameter besides its own. A worker compares its own pieces with everybody's,
not everybody's with all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..plan.region import Box, Region, intersection, numel, relative, view
from .sharded import get_sharded

Owned = tuple[int, Region]
"""Rank and region."""
Local = tuple[Region, torch.Tensor]
"""Region and the tensor, of its shape, that has it."""


@dataclass(frozen=True)
class Route:
    """What this worker sends and receives of one full parameter. It changes only with the plan.

    Attributes:
        send: in the order of receivers, from which of its source boxes, and which box within it.
        receive: in the order of senders, into which of its target boxes, and which box within it.
        send_sizes, receive_sizes: elements for each rank.
    """

    send: list[tuple[int, Box]]
    send_sizes: list[int]
    receive: list[tuple[int, Box]]
    receive_sizes: list[int]


def find_route(sources: Sequence[Owned], targets: Sequence[Owned]) -> Route:
    """The way from where regions of one parameter are to where they are wanted.

    Args:
        sources: every worker's regions, the same on all workers; non-overlapping.
        targets: the regions wanted by every worker, the same on all workers.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    there, wanted = _boxes(sources), _boxes(targets)
    # Both sides take the pieces between two workers in one order: by source box, then by target box.
    send = sorted((wanted[j][0], i, j) for i, j in _meeting(there, wanted, rank))
    receive = sorted((there[i][0], i, j) for j, i in _meeting(wanted, there, rank))

    def pieces(ordered: list[tuple[int, int, int]], within: list[tuple[int, Box]]) -> tuple[list, list[int]]:
        number = {k: index for index, k in enumerate(k for k, (owner, _) in enumerate(within) if owner == rank)}
        found, sizes = [], [0] * world_size
        for other, i, j in ordered:
            common = intersection(there[i][1], wanted[j][1])
            assert common is not None  # they meet
            mine = i if within is there else j
            found.append((number[mine], relative(common, within[mine][1])))
            sizes[other] += numel(common)
        return found, sizes

    return Route(*pieces(send, there), *pieces(receive, wanted))


def _boxes(regions: Sequence[Owned]) -> list[tuple[int, Box]]:
    return [(rank, piece.full) for rank, region in regions for piece in region.pieces]


def _meeting(boxes: list[tuple[int, Box]], others: list[tuple[int, Box]], rank: int) -> Iterator[tuple[int, int]]:
    """Indices of each box of ``rank`` and each of the others that have something in common."""
    corners = np.array([box for _, box in others], dtype=np.int64).reshape(len(others), -1, 2)
    for index, (owner, box) in enumerate(boxes):
        if owner == rank and others:
            start, stop = np.array(box, dtype=np.int64).reshape(-1, 2).T
            meet = (np.maximum(corners[:, :, 0], start) < np.minimum(corners[:, :, 1], stop)).all(axis=1)
            for other in np.flatnonzero(meet).tolist():
                yield index, other


def move(route: Route, mine: list[Local], wanted: list[Local], like: torch.Tensor) -> None:
    """Fill ``wanted`` with the values that the workers' ``mine`` have. Collective over the world (one all-to-all).

    Args:
        mine: this worker's source regions in the order of the route's sources.
        wanted: this worker's target regions in the order of the route's targets, with tensors to fill.
        like: any tensor of the right dtype on the device the collective runs on.
    """
    my_sources, my_targets = _views(mine), _views(wanted)
    send = [view(my_sources[index], box).reshape(-1) for index, box in route.send]
    receive = [view(my_targets[index], box) for index, box in route.receive]
    output = like.new_empty(sum(route.receive_sizes))
    dist.all_to_all_single(
        output, torch.cat(send) if send else like.new_empty(0), route.receive_sizes, route.send_sizes
    )
    for into, values in zip(receive, output.split([piece.numel() for piece in receive]), strict=True):
        into.copy_(values.view(into.shape))


def exchange(
    sources: Sequence[Owned], targets: Sequence[Owned], mine: list[Local], wanted: list[Local], like: torch.Tensor
) -> None:
    """:func:`move` on a route that is used once. Collective."""
    move(find_route(sources, targets), mine, wanted, like)


def _views(local: list[Local]) -> list[torch.Tensor]:
    return [piece for region, tensor in local for _, piece in region.views(tensor)]


def owned_tensors(model: nn.Module) -> dict[str, list[Local]]:
    """Full parameter name -> the regions this worker owns, in the order of ``Held.owners``, with their tensors."""
    sharded = get_sharded(model, "Moving weights")
    stored = {region: tensor for region, tensor in sharded.stored()}
    return {
        name: [(region, stored[region]) for rank, region in owned if rank == sharded.held.rank]
        for name, owned in sharded.held.owners.items()
    }
