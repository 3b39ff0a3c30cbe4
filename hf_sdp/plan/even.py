"""Who holds what: deals the units of a stack of modules to N subnetworks. Pure functions of integers.

The N subnetworks are parted into k groups of N/k (coverage C = m/k in lowest terms, so r = C·N holders per unit).
A module's units are cut into k chunks; group i holds m cyclically adjacent chunks. Down the stack the window of a
group advances by m chunks a module, so what a group has held after T modules is one run of m·T chunks, and every
group has held the same number of units, give or take one. After ``cycle`` modules all have held exactly the same,
and the next partition of a small family takes over, so that any two workers come to share something.

Number of distinct holder sets, the shared one included: at most ``max(MAX_HOLDER_SETS, 2k + 1)``, whatever the
depth. Each is one communicator; NVSwitch machines have 128 multicast slots and a communicator takes about ten
(pytorch/pytorch#187155).
"""

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from functools import cache

import numpy as np

from ..errors import SDPConfigError
from .worker_graph import components

MAX_HOLDER_SETS = 10

Partition = tuple[int, ...]
"""Group of each subnetwork: ``partition[subnetwork]`` is in ``range(k)``, every group has N/k members."""


def replication(coverage: float, num_subnetworks: int) -> int:
    """Holders of each unit, ``r = C·N``. Raises SDPConfigError if that is no integer, naming the nearest that is."""
    r = coverage * num_subnetworks
    nearest = min(max(round(r), 1), num_subnetworks)
    if abs(r - nearest) > 1e-6:
        raise SDPConfigError(
            f"coverage={coverage} of {num_subnetworks} subnetworks gives {r:g} holders per unit, not a whole number. "
            f"Nearest coverage that can be met: {nearest / num_subnetworks:g} "
            f"(multiples of 1/{num_subnetworks} can)."
        )
    return nearest


def reduced(r: int, num_subnetworks: int) -> tuple[int, int]:
    """Coverage as ``(m, k)`` in lowest terms."""
    coverage = Fraction(r, num_subnetworks)
    return coverage.numerator, coverage.denominator


@cache
def partition_family(num_subnetworks: int, m: int, k: int) -> tuple[Partition, ...]:
    """A few partitions of the subnetworks into k groups, chosen so that pairs meet as equally often as possible.

    With m = 1 the groups of one partition share nothing, so there are at least two; with m > 1 neighbouring groups
    share chunks already. Never more than fit into ``MAX_HOLDER_SETS`` beyond that.
    """
    needed = 2 if m == 1 and 1 < k < num_subnetworks else 1
    limit = max(needed, (MAX_HOLDER_SETS - 1) // k)
    candidates = list(dict.fromkeys(_relabelled(c) for c in _candidates(num_subnetworks, k)))
    chosen = [candidates.pop(0)]
    while candidates and len(chosen) < limit:
        best = min(candidates, key=lambda c: _unevenness([*chosen, c]))
        candidates.remove(best)
        chosen.append(best)
    return tuple(chosen)


def _candidates(n: int, k: int):
    group_size = n // k
    for stride in sorted((d for d in range(1, group_size + 1) if group_size % d == 0), reverse=True):
        yield tuple((w // stride) % k for w in range(n))
    # Neighbouring blocks moved by a part of a block: with the first candidate they join all workers in a ring.
    for shift in range(1, min(group_size, 16)):
        yield tuple((((w + shift) % n) // group_size) % k for w in range(n))
    if k == 2 and n <= 64 and n & (n - 1) == 0:  # bit parities: all together, any two workers meet equally often
        for mask in range(1, n):
            yield tuple((w & mask).bit_count() % 2 for w in range(n))


def _relabelled(partition: Partition) -> Partition:
    """The same blocks, numbered in order of first appearance, so that equal partitions compare equal."""
    labels = {group: i for i, group in enumerate(dict.fromkeys(partition))}
    return tuple(labels[group] for group in partition)


def _unevenness(partitions: Sequence[Partition]) -> tuple[int, int]:
    labels = [np.asarray(partition) for partition in partitions]
    k = max(int(label.max()) for label in labels) + 1
    shared = []
    for i, p in enumerate(labels):
        for j, q in enumerate(labels):
            cells, counts = np.unique(p * k + q, return_counts=True)
            shared.append(np.stack([i * k + cells // k, j * k + cells % k, counts]))
    return unevenness(len(labels[0]), *np.concatenate(shared, axis=1))


def unevenness(num_subnetworks: int, a: np.ndarray, b: np.ndarray, num_shared: np.ndarray) -> tuple[int, int]:
    """Lower is better: components of the worker graph, then the spread of how often two workers meet in a block.

    Blocks of workers ``a[i]`` and ``b[i]`` share ``num_shared[i]`` > 0 of them; every ordered pair once, a block with
    itself too. (The squares of the meetings of all pairs add up to the number of pairs that any two blocks share.)
    """
    num_components = len(components(int(a.max()) + 1, zip(a.tolist(), b.tolist(), strict=True)))
    pairs = num_shared * (num_shared - 1) // 2
    num_pairs = num_subnetworks * (num_subnetworks - 1) // 2
    return num_components, int(pairs.sum()) * num_pairs - int(pairs[a == b].sum()) ** 2


def deal(
    *, num_units: int, depth: int, kind_index: int, num_subnetworks: int, r: int, seed: int
) -> list[list[tuple[int, ...]]]:
    """Holders of every unit of every module of one kind, in order of depth.

    Args:
        num_units: units of each of the modules (1 at block level).
        depth: number of modules of this kind.
        kind_index: position of the kind among the kinds (attention, MLP), which start at different places.
    Returns: ``holders[module][unit]``, a sorted tuple of exactly r subnetworks.
    """
    m, k = reduced(r, num_subnetworks)
    if k == 1:
        everyone = tuple(range(num_subnetworks))
        return [[everyone] * num_units for _ in range(depth)]
    family = partition_family(num_subnetworks, m, k)
    cycle = k // math.gcd(k, m * num_units)
    # Turns first, steps second: what one partition keeps apart (attention blocks that no worker holds together) lies
    # far apart in depth. The set of (turn, step) is that of whole cycles, and so is the balance.
    places = sorted((divmod(index, cycle) for index in range(depth)), key=lambda place: (place[1], place[0]))
    # Kinds use different partitions where one alone would separate workers (a single turn) or, at block level, the two
    # blocks of a layer: the full model is evaluated with both, so some workers must train them together.
    # Backwards, so that an MLP and the attention after it differ as well.
    partition_offset = -kind_index if num_units == 1 or math.ceil(depth / cycle) < 2 else 0
    members = [_members(partition, m, k) for partition in family]
    chunk_of_unit = [((unit + 1) * k - 1) // num_units for unit in range(num_units)]
    result = []
    for turn, step in places:
        holders_of = members[(turn + partition_offset) % len(family)]
        start = random.Random(f"{seed}/{turn}").randrange(k) + kind_index * m
        result.append([holders_of((chunk - start - m * step) % k) for chunk in chunk_of_unit])
    return result


def holder_sets_of(num_subnetworks: int, r: int) -> list[tuple[int, ...]]:
    """All holder sets that :func:`deal` may use."""
    m, k = reduced(r, num_subnetworks)
    members = [_members(partition, m, k) for partition in partition_family(num_subnetworks, m, k)]
    return list(dict.fromkeys(holders(chunk) for chunk in range(k) for holders in members))


def _members(partition: Partition, m: int, k: int):
    """Window start -> the subnetworks whose m adjacent chunks, from the number of their group on, have that chunk."""
    groups: list[list[int]] = [[] for _ in range(k)]
    for subnetwork, group in enumerate(partition):
        groups[group].append(subnetwork)

    @cache
    def members(chunk: int) -> tuple[int, ...]:
        return tuple(sorted(w for j in range(m) for w in groups[(chunk - j) % k]))

    return members
