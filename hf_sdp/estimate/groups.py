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
        frozen: full names of parameters that have no gradients.
    """

    group: Group
    members: int
    replicas: int
    index: int
    frozen: frozenset[str]

    @cached_property
    def stored_numel(self) -> int:
        """Elements that this worker stores."""
        return self._numel(self.index, self.group.tensors.values())

    @cached_property
    def learned_numel(self) -> int:
        """Those of them that are not frozen."""
        return self._numel(self.index, self._learned)

    @cached_property
    def shard_numel(self) -> int:
        """Elements of a shard with its padding: what all-gathers send. It is as large as the first one."""
        return self._numel(0, self.group.tensors.values())

    @cached_property
    def reduced_numel(self) -> int:
        """Those of them that are not frozen: what reductions send."""
        return self._numel(0, self._learned)

    @cached_property
    def padded_numel(self) -> int:
        """Elements, with padding, of those that learn and do not divide evenly by the members."""
        uneven = [region for region in self._learned if region.shape[0] % self.members]
        return self.members * self._numel(0, uneven)

    @property
    def _learned(self) -> list[Region]:
        return [region for region in self.group.tensors.values() if region.name not in self.frozen]

    def _numel(self, index: int, regions: Iterable[Region]) -> int:
        return sum(_shard_numel(region.shape, index, self.members) for region in regions)

    @property
    def gathered_numel(self) -> int:
        return self.members * self.shard_numel

    @cached_property
    def largest_numel(self) -> int:
        return max(math.prod(region.shape) for region in self.group.tensors.values())


@cache
def _shard_numel(shape: Shape, index: int, members: int) -> int:
    return Region.whole("", shape).shard(index, members).numel


def stored_groups(
    groups: Iterable[Group], placement: Placement, rank: int, frozen: frozenset[str] = frozenset()
) -> list[StoredGroup]:
    """As ``rank``, a holder of all of them, stores the groups."""
    result = []
    for group in groups:
        mesh = placement.mesh(group.holders)
        index, members = placement.place(group.holders, rank)
        result.append(StoredGroup(group, members, len(mesh), index, frozen))
    return result
