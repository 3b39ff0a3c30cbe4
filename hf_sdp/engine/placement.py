"""Where every element of every full parameter is stored in the world. Pure functions of the plan.

A box is a range per dim of one full parameter. A layout says which rank stores which boxes; the boxes of one
parameter tile it, so every element has exactly one owner (replicas are not listed).
"""

import torch

from ..model.state import Held, SDPState
from ..plan.plan import Holders

Box = tuple[tuple[int, int], ...]


def ranks_of(state: SDPState, holders: Holders) -> torch.Tensor:
    """Workers that hold these subnetworks, int64, shape ``(R, r)``: one row per replica."""
    replicas = torch.arange(state.num_replicas)[:, None] * state.plan.num_subnetworks
    return replicas + torch.tensor(holders)[None, :]


def full_box(shape: tuple[int, ...]) -> Box:
    return tuple((0, size) for size in shape)


def shard_box(box: Box, index: int, num_shards: int) -> Box:
    """The ``index``-th of ``num_shards`` pieces along dim 0, as FSDP2 cuts a tensor (torch.chunk; may be empty)."""
    start, stop = box[0]
    step = -(-(stop - start) // num_shards)
    return ((min(start + index * step, stop), min(start + (index + 1) * step, stop)), *box[1:])


def held_box(held: Held, shape: tuple[int, ...]) -> Box:
    """The box of a local parameter before sharding."""
    return tuple((held.start, held.stop) if dim == held.dim else (0, size) for dim, size in enumerate(shape))


def _shard_ranks(state: SDPState, holders: Holders) -> list[int]:
    """Owners among the workers of a holder set, in order of their shards."""
    ranks = ranks_of(state, holders)
    if state.config.sharding == "none":
        return [int(ranks[0, 0])]
    return (ranks.flatten() if holders == state.plan.everyone else ranks[0]).tolist()


def owned_boxes(state: SDPState) -> dict[str, list[tuple[int, Box]]]:
    """Full parameter name -> ``[(owner's rank, box), ...]`` over the whole world, empty boxes left out."""
    result: dict[str, list[tuple[int, Box]]] = {}
    for name, shape in state.plan.shapes.items():
        pieces = []
        for held in _stored(state, name):
            ranks = _shard_ranks(state, held.holders)
            box = held_box(held, shape)
            shards = [(rank, shard_box(box, i, len(ranks))) for i, rank in enumerate(ranks)]
            pieces += [(rank, piece) for rank, piece in shards if numel(piece)]
        result[name] = pieces
    return result


def _stored(state: SDPState, name: str) -> list[Held]:
    """The pieces in which the world stores a full parameter."""
    plan = state.plan
    if plan.masking == "forward":
        cut = [Held(name, *p.ranges[name], p.holders) for p in plan.parts if name in p.ranges]
        if cut:
            return cut
    return [Held(name, 0, 0, plan.shapes[name][0], plan.everyone)]


def local_box(state: SDPState, held: Held) -> Box:
    """The box that this worker stores of one of its local parameters (owner or replica), before or after sharding."""
    ranks = ranks_of(state, held.holders)
    box = held_box(held, state.plan.shapes[held.name])
    if state.config.sharding == "none" or not state.sharded:
        return box
    row = ranks.flatten() if held.holders == state.plan.everyone else ranks[state.rank // state.plan.num_subnetworks]
    return shard_box(box, row.tolist().index(state.rank), len(row))


def numel(box: Box) -> int:
    total = 1
    for start, stop in box:
        total *= max(stop - start, 0)
    return total


def intersection(a: Box, b: Box) -> Box:
    return tuple((max(a0, b0), max(min(a1, b1), max(a0, b0))) for (a0, a1), (b0, b1) in zip(a, b, strict=True))


def view(tensor: torch.Tensor, of: Box, part: Box) -> torch.Tensor:
    """The elements ``part`` of a tensor that stores the box ``of``."""
    for dim, ((start, _), (a, b)) in enumerate(zip(of, part, strict=True)):
        tensor = tensor.narrow(dim, a - start, b - a)
    return tensor
