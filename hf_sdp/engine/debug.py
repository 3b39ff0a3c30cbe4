"""``HF_SDP_DEBUG=1``: do the workers of each group gather and reduce the same things, in the same order?

Two collectives of equal size that were issued in different orders do not hang: they are paired, and the result is
silently wrong. With the variable set on any worker, all workers write down what they gather and reduce, and compare it
after every change of the weights. Without it nothing is written down.
"""

import hashlib
import itertools
import os
from typing import NamedTuple

import torch
import torch.distributed as dist

from ..errors import SDPStateError
from ..plan.groups import Group
from ..world.agreement import of_everyone
from .sharded import Sharded

VARIABLE = "HF_SDP_DEBUG"
Ranks = tuple[int, ...]


class Collective(NamedTuple):
    """As all members of its group see it: shapes are those of one worker's shard."""

    kind: str
    of: str
    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.kind} of {self.of}, {'x'.join(map(str, self.shape))} {self.dtype}"


def watch_collectives(sharded: Sharded) -> None:
    """Compare collectives from now on, if ``HF_SDP_DEBUG`` is set on any worker. Collective."""
    group = sharded.control_group
    if group is None:
        return
    wanted = torch.tensor(os.environ.get(VARIABLE, "") not in ("", "0"), dtype=torch.int)
    dist.all_reduce(wanted, op=dist.ReduceOp.MAX, group=group)
    if wanted.item():
        watch = CollectiveWatch(sharded)
        sharded.traffic.watch = watch
        sharded.on_change.append(watch.compare)


class CollectiveWatch:
    """What this worker has gathered and reduced since the last comparison, by group."""

    def __init__(self, sharded: Sharded):
        self.sharded = sharded
        self.names = {module: _name(group) for group in sharded.held.groups for module in group.modules}
        self.seen: dict[Ranks, list[Collective]] = {}

    def __call__(self, kind: str, module: str, group: dist.ProcessGroup, shard: torch.Tensor) -> None:
        ranks = tuple(dist.get_process_group_ranks(group))
        dtype = str(shard.dtype).removeprefix("torch.")
        self.seen.setdefault(ranks, []).append(Collective(kind, self.names[module], tuple(shard.shape), dtype))

    def compare(self) -> None:
        """Raises SDPStateError on every worker that names the first difference. Collective."""
        assert self.sharded.roll_call is not None  # with a control group there is one
        self.sharded.roll_call.wait(f"the comparison of collectives ({VARIABLE})")
        seen, self.seen = self.seen, {}
        group = self.sharded.control_group
        hashes = of_everyone({ranks: _hash(collectives) for ranks, collectives in seen.items()}, group)
        for ranks in sorted(set().union(*hashes)):
            different = next((rank for rank in ranks if hashes[rank].get(ranks) != hashes[ranks[0]].get(ranks)), None)
            if different is not None:
                lists = of_everyone(seen.get(ranks, []), group)
                raise SDPStateError(_difference(ranks, {rank: lists[rank] for rank in (ranks[0], different)}))


def _name(group: Group) -> str:
    """The same on all holders, whose local names differ: the first parameter, and the rows or columns of it."""
    if not group.tensors:
        return "nothing"
    first = next(iter(group.tensors.values()))
    cut = ",".join("+".join(f"{start}:{stop}" for start, stop in ranges) for ranges in first.ranges)
    others = f" and {len(group.tensors) - 1} more" if len(group.tensors) > 1 else ""
    return f"{first.name}[{cut}]{others}"


def _hash(collectives: list[Collective]) -> str:
    return hashlib.sha256(repr(collectives).encode()).hexdigest()


def _difference(ranks: Ranks, lists: dict[int, list[Collective]]) -> str:
    pairs = itertools.zip_longest(*lists.values())
    number, first = next((number, pair) for number, pair in enumerate(pairs, 1) if pair[0] != pair[1])
    sides = "; ".join(f"rank {rank}: {one or 'nothing more'}" for rank, one in zip(lists, first, strict=True))
    return (
        f"{VARIABLE}: the workers {list(ranks)} have not gathered and reduced the same things. The first difference "
        f"since the weights changed last is their collective {number}: {sides}. Look for what only some workers do: a "
        "forward more, layers in another order, parameters that are frozen or unused."
    )
