"""Who holds what when workers, or layers, are to hold different shares. Pure functions of numbers.

Given is a share for every (module, subnetwork). Two classic rules keep both sides of the table even:

- A module with several units (neuron level): the wrap-around rule of R. McNaughton (Scheduling with deadlines and loss
  functions, 1959). The subnetworks' lengths are laid end to end around the circle of the module's chunks. Each gets
  adjacent chunks, and no two chunks differ by more than one in their number of holders.
- Modules of one unit (block level): proportionate progress (Baruah, Cohen, Plaxton, Varvel, 1996). Modules are time
  slots, subnetworks are tasks; every module goes to those that lag most behind their shares.

What does not divide evenly is dealt by weight (bytes or FLOPs), over all kinds of modules.
"""

from fractions import Fraction
from functools import cache
from math import lcm

import numpy as np

from ..errors import SDPConfigError
from .even import MAX_HOLDER_SETS, unevenness

MAX_DENOMINATOR = 16  # of shares: each of its steps can be a holder set, and so a communicator
_EPSILON = 1e-9


def denominator(shares: np.ndarray) -> int:
    """The smallest k such that all shares are multiples of 1/k. Raises SDPConfigError when it is over 16."""
    k = lcm(*(Fraction(float(share)).limit_denominator(256).denominator for share in np.unique(shares)))
    if k > MAX_DENOMINATOR:
        nearest = [max(round(share * MAX_DENOMINATOR), 1) / MAX_DENOMINATOR for share in np.unique(shares)]
        raise SDPConfigError(
            f"Coverages {[round(float(s), 4) for s in np.unique(shares)]} are multiples of 1/{k} at best; steps finer "
            f"than 1/{MAX_DENOMINATOR} would take too many communicators. Nearest that can be met: {nearest}."
        )
    return k


def depth_shares(coverage: np.ndarray, depth: int, profile: str) -> np.ndarray:
    """Shares by module and subnetwork, float64 of shape ``(depth, N)``.

    Their mean over depth is ``coverage``, shape ``(N,)``. "linear" goes down from C + d to C - d, with
    d = min(C, 1 - C) / 2, in three steps: finer ones would each bring holder sets of their own. Early layers are
    dropped least in stochastic depth (arXiv 1603.09382, equation 4) and LayerSkip (arXiv 2404.16710, section 4.1), too.
    """
    shares = np.repeat(coverage[None, :], depth, axis=0)
    if profile == "linear":
        slope = np.minimum(coverage, 1 - coverage) / 2
        third = round(depth / 3)
        shares[:third] += slope
        shares[depth - third :] -= slope
    return shares


def orders(shares: np.ndarray, num_chunks: int, seed: int) -> list[np.ndarray]:
    """One or two orders of the subnetworks, used in turn: who is near whom in one is not in the other.

    Args:
        shares: of shape ``(depth, N)``.
    Returns: one order where it connects all workers and a second would take more than ``MAX_HOLDER_SETS`` holder sets.
    """
    rows = np.unique(shares, axis=0) * num_chunks
    n = shares.shape[1]
    first = np.roll(np.arange(n), seed % n)

    def quality(candidates: list[np.ndarray]) -> tuple[int, int, int]:
        """Components, spread of meetings, number of holder sets."""
        chunks = (h for order in candidates for row in rows for h in _wrap_around(row, num_chunks, order, 0.0))
        blocks = sorted({holders for holders in chunks if holders})
        member = np.zeros((len(blocks), n))
        for block, holders in enumerate(blocks):
            member[block, list(holders)] = 1
        num_shared = (member @ member.T).astype(int)
        a, b = np.nonzero(num_shared)
        return *unevenness(n, a, b, num_shared[a, b]), len(blocks)

    components, _, num_sets = quality([first])
    strides = range(2, min(n, 17))
    if not strides or components == 1 and 2 * num_sets >= MAX_HOLDER_SETS:
        return [first]
    interleaved = [np.concatenate([first[offset::stride] for offset in range(stride)]) for stride in strides]
    return [first, min(interleaved, key=lambda order: quality([first, order]))]


def deal_chunks(
    shares: np.ndarray, num_units: int, num_chunks: int, by_turn: list[np.ndarray], kind_index: int
) -> list[list[tuple[int, ...]]]:
    """Holders of every unit of every module of one kind (modules of several units).

    Args:
        shares: of shape ``(depth, N)``.
        num_chunks: into how many pieces a module is dealt; its units are cut into as many, or dealt one by one.
        by_turn: orders of the subnetworks, used in turn.
    Returns: ``holders[module][unit]``, sorted tuples.
    """
    num_chunks = num_chunks if num_units % num_chunks == 0 else num_units
    fraction = denominator((shares * num_chunks) % 1) if np.any(shares * num_chunks % 1 > _EPSILON) else 1

    @cache
    def dealt(lengths: bytes, turn: int, shift: Fraction) -> list[tuple[int, ...]]:
        return _wrap_around(np.frombuffer(lengths), num_chunks, by_turn[turn], float(shift))

    result = []
    for index, row in enumerate(shares):
        # Where lengths are no whole numbers, the shift lets each subnetwork round up as often as it is due.
        shift = Fraction(index // len(by_turn) % fraction, fraction)
        chunks = dealt((row * num_chunks).tobytes(), (index + kind_index) % len(by_turn), shift)
        size = num_units // num_chunks
        result.append([holders for holders in chunks for _ in range(size)])
    return result


def _wrap_around(lengths: np.ndarray, num_chunks: int, order: np.ndarray, shift: float) -> list[tuple[int, ...]]:
    """Holders of each chunk when ``lengths`` (in chunks) are laid end to end in this order."""
    ends = np.floor(shift + np.cumsum(lengths[order]) + _EPSILON).astype(int)
    starts = np.concatenate([[int(np.floor(shift + _EPSILON))], ends[:-1]])
    holders: list[list[int]] = [[] for _ in range(num_chunks)]
    for subnetwork, start, end in zip(order.tolist(), starts.tolist(), ends.tolist(), strict=True):
        for chunk in range(start, end):
            holders[chunk % num_chunks].append(subnetwork)
    return [tuple(sorted(h)) for h in holders]


def deal_blocks(
    shares: np.ndarray, cycle: int, order: np.ndarray, weight: float, debt: np.ndarray
) -> tuple[list[list[tuple[int, ...]]], np.ndarray]:
    """Holders of every module of one kind (modules of one unit), and the debt after them.

    Args:
        shares: of shape ``(depth, N)``.
        cycle: after as many modules all have had exactly their shares. What is left over at the end goes to whom most
            is owed, the kinds dealt before included.
        weight: of one module, in bytes or FLOPs.
        debt: what each subnetwork is owed of the kinds dealt before (negative: has too much), shape ``(N,)``, in the
            unit of ``weight``.
    """
    counts = np.diff(np.floor(np.cumsum(shares.sum(1)) + 0.5 - _EPSILON), prepend=0).astype(int)
    position = np.argsort(order)
    lag = np.zeros(shares.shape[1])
    result = []

    @cache  # one tuple for equal holder sets, whatever the depth
    def as_tuple(chosen: bytes) -> tuple[int, ...]:
        return tuple(np.frombuffer(chosen, dtype=np.intp).tolist())

    num_whole = len(shares) // cycle * cycle
    for index, (row, count) in enumerate(zip(shares, counts.tolist(), strict=True)):
        lag = lag + row
        owed = np.round(lag + (debt / weight if index >= num_whole else 0), 9)
        # First who would fall a whole unit behind, last who has had its share; between them by what is owed.
        ranked = np.lexsort((position, -owed, lag < 1 - _EPSILON, lag <= _EPSILON))
        chosen = np.sort(ranked[:count])
        lag[chosen] -= 1
        result.append([as_tuple(chosen.tobytes())])
    return result, debt + weight * lag
