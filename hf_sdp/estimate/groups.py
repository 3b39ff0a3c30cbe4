"""Groups of a plan as one worker stores and gathers them, in elements."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, cached_property

from ..plan.groups import Group
from ..plan.placement import Placement
from ..plan.region import Region, Shape


@dataclass(frozen=True)
class StoredGroup:
    """A group on one worker.

    Attributes:
        group: what it consists of.
        members: workers among whom it is sharded.
        replicas: copies of that sharding, among which gradients are all-reduced.
        index: this worker's place among the members.
    """

    group: Group
    members: int
    replicas: int
    index: int

    @cached_property
    def stored_numel(self) -> int:
        """Elements that this worker stores."""
        return sum(_shard_numel(region.shape, self.index, self.members) for region in self.group.tensors.values())

    @cached_property
    def shard_numel(self) -> int:
        """Elements of a shard with its padding: what collectives send. It is as large as the first one."""
        return sum(_shard_numel(region.shape, 0, self.members) for region in self.group.tensors.values())

    @property
    def gathered_numel(self) -> int:
        return self.members * self.shard_numel

    @cached_property
    def largest_numel(self) -> int:
        return max(math.prod(region.shape) for region in self.group.tensors.values())


@cache
def _shard_numel(shape: Shape, index: int, members: int) -> int:
    return Region.whole("", shape).shard(index, members).numel


def stored_groups(groups: Iterable[Group], placement: Placement, rank: int) -> list[StoredGroup]:
    """As ``rank``, a holder of all of them, stores the groups."""
    result = []
    for group in groups:
        mesh = placement.mesh(group.holders)
        index, members = placement.place(group.holders, rank)
        result.append(StoredGroup(group, members, len(mesh), index))
    return result
