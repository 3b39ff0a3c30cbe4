"""``Region``: which part of a full tensor something is. The one type for a range of a parameter or buffer.

A slice of a unit, a local parameter, a shard of it and a piece of a checkpoint are all regions of full tensors.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

Shape = tuple[int, ...]
Ranges = tuple[tuple[int, int], ...]
"""``(start, stop)`` along one dim, none of them empty, in the order in which they are put together."""
Box = tuple[tuple[int, int], ...]
"""One ``(start, stop)`` for each dim of a tensor. A tensor without dims has one box, ``()``."""


class Piece(NamedTuple):
    """One box of a region: where it is in the full tensor, and where in the local one."""

    full: Box
    local: Box


@dataclass(frozen=True)
class Region:
    """A part of one full tensor: along each dim some ranges, put together.

    A local tensor that is a region has the region's shape. Fused projections have several ranges along one dim; a
    tensor may be cut along several dims.

    Attributes:
        name: full name of the parameter or buffer.
        ranges: for each dim its ranges.
    """

    name: str
    ranges: tuple[Ranges, ...]

    @classmethod
    def whole(cls, name: str, shape: Shape) -> "Region":
        return cls(name, tuple(((0, size),) if size else () for size in shape))

    @cached_property
    def shape(self) -> Shape:
        """Of the local tensor."""
        return tuple(sum(stop - start for start, stop in ranges) for ranges in self.ranges)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def rows(self, first: int, last: int) -> "Region":
        """The part whose local rows (dim 0) are ``first:last``."""
        found, offset = [], 0
        for start, stop in self.ranges[0]:
            a, b = max(first - offset, 0), min(last - offset, stop - start)
            if a < b:
                found.append((start + a, start + b))
            offset += stop - start
        return Region(self.name, (tuple(found), *self.ranges[1:]))

    def shard(self, index: int, num_shards: int) -> "Region":
        """The ``index``-th of ``num_shards`` pieces along dim 0, as FSDP2 cuts a tensor (torch.chunk; may be empty)."""
        return self if num_shards == 1 else self.rows(*rows_of_shard(self.shape[0], index, num_shards))

    @cached_property
    def pieces(self) -> tuple[Piece, ...]:
        """The boxes that make up the region; none where it is empty."""
        by_dim = [list(_placed(ranges)) for ranges in self.ranges]
        return tuple(
            Piece(tuple(full for full, _ in chosen), tuple(local for _, local in chosen))
            for chosen in itertools.product(*by_dim)
        )

    def views(self, tensor: torch.Tensor) -> Iterator[tuple[Box, torch.Tensor]]:
        """For each piece its box in the full tensor, and the view of ``tensor``, of the region's shape, that has it."""
        for piece in self.pieces:
            yield piece.full, view(tensor, piece.local)

    def of(self, full: torch.Tensor) -> torch.Tensor:
        """The region's values of the full tensor, in memory of their own."""
        result = full.new_empty(self.shape)
        for box, into in self.views(result):
            into.copy_(view(full, box))
        return result


def rows_of_shard(num_rows: int, index: int, num_shards: int) -> tuple[int, int]:
    """``(start, stop)`` of the ``index``-th shard; where rows do not suffice, behind the last one."""
    step = -(-num_rows // num_shards)
    return index * step, (index + 1) * step


def _placed(ranges: Ranges) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Each range, and where it lies when all are put together."""
    offset = 0
    for start, stop in ranges:
        yield (start, stop), (offset, offset + stop - start)
        offset += stop - start


def view(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """The elements of ``box``, without a copy."""
    for dim, (start, stop) in enumerate(box):
        tensor = tensor.narrow(dim, start, stop - start)
    return tensor


def numel(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes of one tensor have in common; None when that is nothing."""
    common = tuple((max(a0, b0), min(a1, b1)) for (a0, a1), (b0, b1) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None


def relative(box: Box, within: Box) -> Box:
    """``box`` as seen from the first element of ``within``."""
    return tuple((start - origin, stop - origin) for (start, stop), (origin, _) in zip(box, within, strict=True))
