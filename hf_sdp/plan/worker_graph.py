"""The worker graph: who shares units with whom, in how many components, and how quickly what one learns reaches all."""

from collections.abc import Collection, Iterable

import numpy as np

from .holdings import Holdings
from .plan import Plan

MAX_EXACT = 2048
"""Rows of the largest matrix whose eigenvalues are computed: seconds on one core."""


def components(num_nodes: int, sets: Iterable[Collection[int]]) -> list[set[int]]:
    """The connected components of ``0..num_nodes-1``, where the members of each set are connected.

    Of subnetworks and holder sets: groups between which no unit is shared.
    """
    found: list[set[int]] = []
    for members in sets:
        # Sets of thousands, but few components: whole sets are joined, which is quicker than member by member.
        joined, apart = set(members), []
        for other in found:
            if other.isdisjoint(members):
                apart.append(other)
            else:
                joined |= other
        found = [*apart, joined]
    return found + [{node} for node in set(range(num_nodes)).difference(*found)]


def groups_that_share(plan: Plan) -> list[set[int]]:
    """Subnetworks in groups between which no unit is shared: one, where the worker graph is connected."""
    dealt = {number for module in plan.dealt for number in plan.set_of_unit[module.name]}
    return components(plan.num_subnetworks, (plan.holder_sets[number] for number in sorted(dealt)))


def spectral_gap(holdings: Holdings, elements: np.ndarray) -> float | None:
    """1 - the second largest eigenvalue of the walk worker -> unit -> worker. 0: not connected; 1: everyone holds
    everything.

    The walk goes from a worker to one of the units it holds, each as likely as it has elements. It goes on to one of
    that unit's holders, each as likely.

    With B (workers x holder sets) saying who is in which set, e_h elements and r_h holders of a set, and M_w elements
    of a worker, the walk P = D(1/M) B D(e/r) B^T is similar to X X^T, X = D(1/M)^(1/2) B D(e/r)^(1/2). So no eigenvalue
    is negative (the second largest is also the second by modulus). Those that are not zero are those of X^T X, which
    has a row for each holder set: few, however many workers and units there are.

    Args:
        elements: of the units with each holder set, shape ``(H,)``. Leave out what all hold: it would hide what the
            plan does.
    Returns: None when there are more than ``MAX_EXACT`` workers and as many holder sets.
    """
    counts = elements > 0
    if len(components(len(holdings.members), holdings.sets_with(counts))) > 1:
        return 0.0
    x = holdings.members[:, counts] * np.sqrt(elements / holdings.num_holders)[counts]
    x /= np.sqrt(holdings.members @ elements)[:, None]
    if min(x.shape) > MAX_EXACT:
        return None
    eigenvalues = np.linalg.eigvalsh(x.T @ x if x.shape[0] > x.shape[1] else x @ x.T)  # ascending
    second = eigenvalues[-2] if len(eigenvalues) > 1 else 0.0
    return float(np.clip(1 - second, 0, 1))
