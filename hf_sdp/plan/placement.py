"""Who stores what. The rule by which the holders of something share its storage among them.

``sharding="full"``: the holders of one replica each store a part of it, and replicas store it again. What everyone
holds is shared by the whole world, so that every element is stored once there. ``sharding="none"``: every holder stores
all.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .holders import Holders
from .plan import Plan
from .region import Region


@dataclass(frozen=True)
class Placement:
    """How a world stores a plan. Worker w holds subnetwork w mod N.

    Attributes:
        num_workers: W, a multiple of N.
        num_subnetworks: N.
        sharding: as in ``SDPConfig``.
    """

    num_workers: int
    num_subnetworks: int
    sharding: str

    @property
    def num_replicas(self) -> int:
        """Workers that hold the same subnetwork: R = W / N."""
        return self.num_workers // self.num_subnetworks

    def mesh(self, holders: Holders) -> list[list[int]]:
        """Ranks of the workers that hold something, shape ``(replicas, shards)``.

        Workers of a row each store one shard, in this order; those of a column store the same one.
        """
        rows = [[replica * self.num_subnetworks + s for s in holders] for replica in range(self.num_replicas)]
        ranks = [rank for row in rows for rank in row]
        if self.sharding == "none":
            return [[rank] for rank in ranks]
        return [ranks] if len(ranks) == self.num_workers else rows

    def place(self, holders: Holders, rank: int) -> tuple[int, int]:
        """``(index, number)`` of the shard that ``rank``, one of the holders, stores."""
        for row in self.mesh(holders):
            if rank in row:
                return row.index(rank), len(row)
        raise AssertionError(f"rank {rank} is not in the mesh of {holders}")

    def stored(self, region: Region, holders: Holders, rank: int) -> Region:
        """What ``rank``, one of the holders, stores of a region that they hold."""
        return region.shard(*self.place(holders, rank))

    def owned(self, region: Region, holders: Holders) -> Iterator[tuple[int, Region]]:
        """``(rank, region)`` for the owner of each shard that is not empty. Replicas are not owners."""
        yield from self._of_row(region, self.mesh(holders)[0])

    def stored_by_all(self, region: Region, holders: Holders) -> Iterator[tuple[int, Region]]:
        """``(rank, region)`` for each shard that is not empty, those of replicas too."""
        for row in self.mesh(holders):
            yield from self._of_row(region, row)

    def _of_row(self, region: Region, ranks: list[int]) -> Iterator[tuple[int, Region]]:
        for index, rank in enumerate(ranks):
            shard = region.shard(index, len(ranks))
            if shard.numel:
                yield rank, shard


_Placed = dict[str, list[tuple[int, Region]]]


def owners(plan: Plan, placement: Placement) -> _Placed:
    """Full parameter name -> ``(owner's rank, region)``; the regions of one parameter tile it."""
    return _placed(plan, placement.owned)


def stored_by_all(plan: Plan, placement: Placement) -> _Placed:
    """The same of all that is stored, replicas too."""
    return _placed(plan, placement.stored_by_all)


def _placed(plan: Plan, place: Callable[[Region, Holders], Iterator[tuple[int, Region]]]) -> _Placed:
    result: _Placed = {name: [] for name in plan.shapes}
    cut = plan.cut if plan.masking == "forward" else {}
    for part in plan.parts if cut else ():
        for name, region in part.regions.items():
            result[name] += place(region, part.holders)
    for name in result.keys() - cut.keys():
        result[name] += place(Region.whole(name, plan.shapes[name]), plan.everyone)
    return result
