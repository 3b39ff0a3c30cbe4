"""Who holds which blocks where they differ in size: those of a later stage have 4 times the parameters of the one
before it, and 1 to 4 times less to compute.

In each stage every subnetwork gets the same number of blocks of each kind, give or take one, and so the same bytes and
the same FLOPs. Who gets one more is decided by weight, over all stages, the heaviest stage first. Pure functions.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from .even import holder_sets_of
from .holders import Holders


@dataclass(frozen=True)
class Sized:
    """A block that is dealt: its kind, its stage, and its weight in bytes or FLOPs."""

    kind: str
    stage: Hashable
    weight: float


def deal_stages(blocks: Sequence[Sized], *, num_subnetworks: int, r: int, seed: int) -> list[Holders]:
    """Holders of each block, r of them.

    Holder sets are those of ``even.deal``: each is one communicator. Among equally good ones the one that is used least
    is taken, so that any two workers come to share something.
    """
    candidates = holder_sets_of(num_subnetworks, r)
    candidates = candidates[seed % len(candidates) :] + candidates[: seed % len(candidates)]
    member = np.zeros((len(candidates), num_subnetworks))
    for index, holders in enumerate(candidates):
        member[index, list(holders)] = 1
    used = np.zeros(len(candidates), dtype=int)
    in_all = np.zeros(num_subnetworks)
    of_kind: dict[str, np.ndarray] = {}
    counts: dict[tuple[str, Hashable], np.ndarray] = {}
    result: dict[int, Holders] = {}
    kinds = list(dict.fromkeys(block.kind for block in blocks))
    order = sorted(range(len(blocks)), key=lambda n: (kinds.index(blocks[n].kind), -blocks[n].weight, n))
    for number in order:
        block = blocks[number]
        count = counts.setdefault((block.kind, block.stage), np.zeros(num_subnetworks))
        load = of_kind.setdefault(block.kind, np.zeros(num_subnetworks))
        uneven = ((count + member) ** 2).sum(1)
        heavy = ((load + block.weight * member) ** 2).sum(1) + ((in_all + block.weight * member) ** 2).sum(1)
        best = int(np.lexsort((used, heavy, uneven))[0])
        used[best] += 1
        count += member[best]
        load += block.weight * member[best]
        in_all += block.weight * member[best]
        result[number] = candidates[best]
    return [result[number] for number in range(len(blocks))]
