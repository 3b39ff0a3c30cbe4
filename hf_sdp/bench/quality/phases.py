"""Which plan a run trains when: its phases in steps, and the deals within them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import TrainerCallback

from ...errors import SDPConfigError
from ...model.stacked import can_be_stacked, stack
from ...plan.plan import Plan
from ...planner import make_plan
from .methods import Method, Redeal
from .setting import Setting


@dataclass(frozen=True)
class Phase:
    """``start``: share of the run's FLOPs before it; ``step_flops``: of each of its steps."""

    start: float
    plan: Plan
    step_flops: float


def stacked_phases(
    method: Method, setting: Setting, seed: int, count: Callable[[nn.Module], float]
) -> list[Phase] | None:
    """The phases of a method of SDP; None when its workers can only be simulated one after the other.

    ``count``: FLOPs of a step of a model that has been stacked.
    Raises: SDPConfigError when this is none, and the method has several phases or deals anew.
    """
    model = method.dense(setting, seed)
    plans = [(start, make_plan(model, config, setting.workers)) for start, config in method.phases(seed)]
    if not all(can_be_stacked(model, plan) for _, plan in plans):
        if method.changes or method.redeal:
            raise SDPConfigError(
                f"{method.name}: phases and deals can be simulated of a Llama, with units that divide evenly among "
                f"{setting.workers} workers, not of this {type(model).__name__}. Leave them out."
            )
        return None
    if method.redeal and any(plan.level == "block" for _, plan in plans):
        raise SDPConfigError(f"{method.name}: a block is one unit, which cannot be dealt anew. Use neuron level.")
    found = []
    for start, plan in plans:
        stack(model, plan)
        found.append(Phase(start, plan, count(model)))
    return found


def mean_step_flops(phases: list[Phase]) -> float:
    """Of a run's steps: phases have shares of its FLOPs, so cheap ones have more steps."""
    return 1 / sum(_steps_of_one_flop(phases))


def first_steps(phases: list[Phase], steps: int) -> list[int]:
    """Of a run of ``steps``, the step before which each phase begins."""
    found, before, shares = [], 0.0, _steps_of_one_flop(phases)
    for share in shares:
        found.append(round(steps * before / sum(shares)))
        before += share
    return found


def _steps_of_one_flop(phases: list[Phase]) -> list[float]:
    ends = [*(phase.start for phase in phases[1:]), 1.0]
    return [(end - phase.start) / phase.step_flops for phase, end in zip(phases, ends, strict=True)]


class ChangesPlan(TrainerCallback):
    """Stacks the model for each phase and deal, before its first step."""

    def __init__(self, phases: list[Phase], firsts: list[int], redeal: Redeal | None, seed: int):
        self.plans = {first: phase.plan for first, phase in zip(firsts, phases, strict=True)}
        self.redeal, self.seed = redeal, seed

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        step = state.global_step
        deals = self.redeal is not None and step % self.redeal.every == 0
        if step not in self.plans and not deals:
            return
        plan = self.plans[max(first for first in self.plans if first <= step)]
        if self.redeal is not None:
            plan = redealt(plan, self.redeal.order, step // self.redeal.every, self.seed)
        stack(model, plan)


def redealt(plan: Plan, order: str, number: int, seed: int) -> Plan:
    """The same with the units of every module permuted: the ``number``-th deal, of which 0 is the plan itself."""
    generator = torch.Generator().manual_seed(seed * 2**20 + number)

    def permuted(sets: tuple[int, ...]) -> tuple[int, ...]:
        if order == "random" and number:
            return tuple(sets[i] for i in torch.randperm(len(sets), generator=generator))
        return tuple(sets[(i - number) % len(sets)] for i in range(len(sets))) if order == "rolling" else sets

    return dataclasses.replace(plan, set_of_unit={name: permuted(sets) for name, sets in plan.set_of_unit.items()})
