"""``memory_gib``: how much of the model each worker can hold. The estimate of a step's peak decides, plan by plan."""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from ..config import SDPConfig
from ..errors import SDPConfigError
from ..model.phases import Planned
from ..plan.plan import Plan
from .memory import sdp_step
from .shapes import Model

STEPS = 8  # coverages are multiples of 1/8: as fine as a linear depth profile can halve again
MAX_ESTIMATES = 64  # of the workers of one capacity, who hold equal shares
GIB = 2**30


def fit(
    model: Model,
    config: SDPConfig,
    num_subnetworks: int,
    plan_of: Callable[[np.ndarray], Plan],
) -> np.ndarray:
    """The share of each subnetwork, float64 of shape ``(N,)``: as much as fits, in steps of 1/8.

    Whoever is over its capacity by the largest factor holds a step less, until all fit: less held by one is more state
    for the other holders. With ``balance="compute"`` shares are then made as equal as capacities allow, so that no
    worker waits for one with a larger share. What a worker needs is the peak of a step, as ``hf-sdp estimate`` says it
    for one worker a subnetwork (replicas only lower it).

    Args:
        plan_of: shares -> plan; raises SDPConfigError for shares that cannot be dealt.
    Raises: SDPConfigError when the workers cannot hold the model together, with what each of them would need.
    """
    assert config.memory_gib is not None  # the planner asks only with it
    capacities = np.array(config.memory_gib) * GIB
    if len(capacities) != num_subnetworks:
        raise _other_number(config.memory_gib, num_subnetworks)
    search = _Search(model, config, capacities, plan_of)
    steps, stuck, reason = np.full(num_subnetworks, STEPS), np.zeros(num_subnetworks, dtype=bool), None
    while (over := (need := search.need(steps)) > capacities).any():
        if (over <= stuck).all():
            raise _shortage(config.memory_gib, steps, need - capacities, need, reason)
        worst = capacities == capacities[np.where(over & ~stuck, need / capacities, 0).argmax()]
        try:
            plan_of((steps - worst) / STEPS)
            steps = steps - worst
        except SDPConfigError as error:  # cannot be dealt: not one unit each, or too few holders
            stuck, reason = stuck | worst, error
    return (search.level(steps) if config.balance == "compute" else steps) / STEPS


def refuse_what_does_not_fit(model: Model, planned: Planned, config: SDPConfig) -> None:
    """Raises SDPConfigError when a phase of ``config.coverage_schedule`` needs more than ``config.memory_gib``."""
    assert config.memory_gib is not None and config.workload is not None
    plan = planned.plan
    if len(config.memory_gib) != plan.num_subnetworks:
        raise _other_number(config.memory_gib, plan.num_subnetworks)
    capacities = np.array(config.memory_gib) * GIB
    of_phase = dataclasses.replace(config, workload=planned.phase.workload_of(config.workload))
    pieces = planned.phase.pieces_of(config.workload)
    search = _Search(model, of_phase, capacities, lambda steps: plan, pieces)
    need = search.need(np.full(plan.num_subnetworks, STEPS))
    if (need > capacities).any():
        raise SDPConfigError(
            f"memory_gib={list(config.memory_gib)} is too little for the phase of coverage_schedule from "
            f"{planned.phase.start:g} (coverage {planned.phase.coverage:g}): the workers need "
            f"{[float(f'{n / GIB:.4g}') for n in need]} GiB. Use a smaller coverage, or its "
            "gradient_checkpointing=True or splits."
        )


def _other_number(memory_gib: Sequence[float], num_subnetworks: int) -> SDPConfigError:
    return SDPConfigError(
        f"memory_gib lists {len(memory_gib)} subnetworks {list(memory_gib)}, there are {num_subnetworks}. "
        f"Give one for each, or num_subnetworks={len(memory_gib)} for replicas of them."
    )


def _shortage(
    memory_gib: Sequence[float], steps: np.ndarray, over: np.ndarray, need: np.ndarray, reason: SDPConfigError | None
) -> SDPConfigError:
    return SDPConfigError(
        f"memory_gib={list(memory_gib)} is {np.maximum(over, 0).sum() / GIB:.4g} GiB too little: with coverage "
        f"{(steps / STEPS).tolist()} the workers need {[float(f'{n / GIB:.4g}') for n in need]} GiB, "
        f"and with less: {reason}"
    )


class _Search:
    """``pieces``: as of ``sdp_step``."""

    def __init__(self, model: Model, config: SDPConfig, capacities: np.ndarray, plan_of, pieces: int = 1):
        self.model, self.config, self.capacities, self.plan_of = model, config, capacities, plan_of
        self.pieces = pieces

    def need(self, steps: np.ndarray) -> np.ndarray:
        """Peak bytes of each worker; of many with one capacity, the largest of some."""
        plan = self.plan_of(steps / STEPS)
        need = np.zeros(len(steps))
        for capacity in np.unique(self.capacities):
            members = np.flatnonzero(self.capacities == capacity)
            asked = members[:: -(-len(members) // MAX_ESTIMATES)]
            need[members] = max(self._peak(plan, int(w)) for w in asked)
        return need

    def _peak(self, plan: Plan, subnetwork: int) -> int:
        assert self.config.workload is not None  # SDPConfig asks for it beside memory_gib
        return sdp_step(
            self.model,
            plan,
            subnetwork,
            self.config.workload,
            sharding=self.config.sharding,
            reshard_after_forward=self.config.reshard_after_forward,
            pieces=self.pieces,
        ).memory.peak

    def fits(self, steps: np.ndarray) -> bool:
        try:
            return bool((self.need(steps) <= self.capacities).all())
        except SDPConfigError:
            return False

    def level(self, steps: np.ndarray) -> np.ndarray:
        """Shares that fit, and are as equal as that allows."""
        for equal in range(STEPS, 0, -1):
            if self.fits(np.full_like(steps, equal)):
                return np.full_like(steps, equal)
        while self.fits(lower := np.minimum(steps, steps.max() - 1)):
            steps = lower
        return steps
