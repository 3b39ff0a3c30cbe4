"""The engines side by side: what a step of each takes, of every worker."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import SDPConfigError
from ..model.phases import Planned
from ..model.recomputation import recomputation_reorders
from ..plan.plan import Plan
from ..workload import Workload
from .memory import Step, fsdp_step, replicated_step, sdp_step
from .names import DDP, DDP_CHECKPOINTING, FSDP2, FSDP2_NO_RESHARD, RESHARD, SDP, SHARDING_NONE, ZERO_1, ZERO_2
from .shapes import Model, shapes_of

MAX_WORKERS = 64
SHARDINGS: dict[str, dict] = {
    SDP: dict(sharding="full"),
    f"{SDP}, {RESHARD}": dict(sharding="full", reshard_after_forward=True),
    f"{SDP}, {SHARDING_NONE}": dict(sharding="none"),
}


@dataclass(frozen=True)
class Row:
    """``steps``: one for each subnetwork that was looked at (one where all workers are alike)."""

    engine: str
    steps: tuple[Step, ...]

    @property
    def largest(self) -> Step:
        """Of the worker with the highest peak."""
        return max(self.steps, key=lambda step: step.memory.peak)


def subnetworks(plan: Plan) -> list[int]:
    """All subnetworks; of more than ``MAX_WORKERS`` as many, evenly spaced."""
    number = min(plan.num_subnetworks, MAX_WORKERS)
    return [i * plan.num_subnetworks // number for i in range(number)]


def sdp_rows(model: Model, plan: Plan, workload: Workload, world_size: int, pieces: int = 1) -> list[Row]:
    """One row for each sharding that the engine runs. ``pieces``: as of ``sdp_step``."""
    rows = []
    for name, sharding in SHARDINGS.items():
        gathers_again = sharding.get("reshard_after_forward") and workload.gradient_checkpointing
        if not (gathers_again and recomputation_reorders(plan)):  # which the engine refuses
            steps = tuple(
                sdp_step(model, plan, subnetwork, workload, world_size=world_size, pieces=pieces, **sharding)
                for subnetwork in subnetworks(plan)
            )
            rows.append(Row(name, steps))
    return rows


def rows_of_phases(model: Model, phases: Sequence[Planned], workload: Workload, world_size: int) -> list[Row]:
    """Those of each phase; of several their names say where it begins."""
    rows = []
    for planned in phases:
        start = f", from {planned.phase.start:g}" if len(phases) > 1 else ""
        largest, pieces = planned.phase.workload_of(workload), planned.phase.pieces_of(workload)
        for row in sdp_rows(model, planned.plan, largest, world_size, pieces):
            rows.append(dataclasses.replace(row, engine=row.engine + start))
    return rows


def other_rows(model: Model, workload: Workload, world_size: int) -> list[Row]:
    """What everyone asks about: DDP (also with activation checkpointing, if it can), ZeRO-1, ZeRO-2, FSDP2."""

    def replicated(zero_stage: int, of: Workload = workload) -> tuple[Step, ...]:
        return (replicated_step(model, of, world_size, zero_stage=zero_stage),)

    def sharded(reshard_after_forward: bool) -> tuple[Step, ...]:
        return (fsdp_step(model, workload, world_size, reshard_after_forward=reshard_after_forward),)

    saves_all, recomputes = (dataclasses.replace(workload, gradient_checkpointing=on) for on in (False, True))
    can_recompute = shapes_of(model).model.supports_gradient_checkpointing
    return [
        Row(DDP, replicated(0, saves_all)),
        *([Row(DDP_CHECKPOINTING, replicated(0, recomputes))] if can_recompute else []),
        Row(ZERO_1, replicated(1)),
        Row(ZERO_2, replicated(2)),
        Row(FSDP2, sharded(True)),
        Row(FSDP2_NO_RESHARD, sharded(False)),
    ]


def largest_coverage(
    make: Callable[[float], Plan], model: Model, workload: Workload, world_size: int, limit: int
) -> dict[str, float | None]:
    """For each sharding the largest coverage r/N whose workers all stay within ``limit`` bytes; None when none does.

    Args:
        make: coverage -> plan; SDPConfigError where the planner cannot meet it. Peaks grow with coverage, so it is
            asked for about log2(N) coverages.
        world_size: also N.
    """
    plans: dict[int, Plan | None] = {}

    def plan_of(holders: int) -> Plan | None:
        if holders not in plans:
            try:
                plans[holders] = make(holders / world_size)
            except SDPConfigError:
                plans[holders] = None
        return plans[holders]

    def fits(holders: int, sharding: dict) -> bool:
        plan = plan_of(holders)
        return plan is not None and all(
            sdp_step(model, plan, subnetwork, workload, world_size=world_size, **sharding).memory.peak <= limit
            for subnetwork in subnetworks(plan)
        )

    found: dict[str, float | None] = {}
    for name, sharding in SHARDINGS.items():
        low, high = 0, world_size + 1  # low fits (0: nothing), high does not
        while high - low > 1:
            middle = (low + high) // 2
            if plan_of(middle) is None:  # too little for one unit: a smaller coverage cannot be met either
                low = middle
            elif fits(middle, sharding):
                low = middle
            else:
                high = middle
        found[name] = low / world_size if low and plan_of(low) is not None else None
    return found
