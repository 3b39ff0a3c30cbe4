"""Which plan a run of SDP trains when: its phases in steps, and the deals within them."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import TrainerCallback

from ...config import SDPConfig
from ...errors import SDPConfigError
from ...hosts.trainer import SDPCallback
from ...model.stacked import can_be_stacked, stack
from ...patch import patch_model
from ...plan.plan import Plan
from ...planner import make_plan
from ...schedule import Phase, first_steps, steps_for_one
from .methods import Method, Redeal
from .setting import Setting


@dataclass(frozen=True)
class Course:
    """How a method of SDP is trained.

    Attributes:
        phases: of the method, with starts in shares of the run's FLOPs.
        plans, costs: of each its plan, and the FLOPs of a step.
        is_stacked: whether all workers are simulated at once, else one after the other.
    """

    method: Method
    seed: int
    phases: tuple[tuple[Phase, SDPConfig], ...]
    plans: list[Plan]
    costs: list[float]
    is_stacked: bool

    @classmethod
    def of(cls, method: Method, setting: Setting, seed: int, count: Callable[[nn.Module], float]) -> "Course":
        """``count``: FLOPs of a step of a model.

        Raises: SDPConfigError when a coverage cannot be met, or units cannot be dealt anew.
        """
        model, phases = method.dense(setting, seed), method.config(seed).phases
        plans = [make_plan(model, config, setting.workers) for _, config in phases]
        is_stacked = all(can_be_stacked(model, plan) for plan in plans)
        if method.redeal and (not is_stacked or any(plan.level == "block" for plan in plans)):
            raise SDPConfigError(
                f"{method.name}: units are dealt anew at neuron level, of a Llama in which every worker holds as many. "
                f"Leave {method.redeal} out."
            )
        costs = []
        for (_, config), plan in zip(phases, plans, strict=True):
            if is_stacked:
                stack(model, plan)
            elif len(phases) == 1:
                model = method.build(setting, seed)
            else:
                static = dataclasses.replace(config, simulate=setting.workers)
                model = patch_model(method.dense(setting, seed), static)
            costs.append(count(model))
        return cls(method, seed, phases, plans, costs, is_stacked)

    @property
    def starts(self) -> list[float]:
        return [phase.start for phase, _ in self.phases]

    @property
    def mean_cost(self) -> float:
        """FLOPs of a step, mean over the run: phases have shares of its FLOPs, so cheap ones have more steps."""
        return 1 / sum(steps_for_one(self.starts, self.costs))

    def first_steps(self, steps: int) -> list[int]:
        """The step before which each phase begins, in a run of ``steps``."""
        return first_steps(self.starts, self.costs, steps)

    def prepared(self, setting: Setting, steps: int) -> tuple[nn.Module, TrainerCallback]:
        """The model to train, and what leads it through the phases of a run of ``steps``."""
        firsts = self.first_steps(steps)
        if self.is_stacked:
            deals = ChangesPlan(dict(zip(firsts, self.plans, strict=True)), self.method.redeal, self.seed)
            return self.method.dense(setting, self.seed), deals
        if len(firsts) == 1:
            return self.method.build(setting, self.seed), SDPCallback()
        phases = [dataclasses.replace(p, start=f / steps) for (p, _), f in zip(self.phases, firsts, strict=True)]
        config = dataclasses.replace(
            self.method.config(self.seed),
            coverage_schedule=phases,
            coverage_schedule_unit="steps",
            simulate=setting.workers,
        )
        return patch_model(self.method.dense(setting, self.seed), config), SDPCallback()


class ChangesPlan(TrainerCallback):
    """Stacks the model for each phase and deal. ``plans``: the step before which each phase begins -> its plan."""

    def __init__(self, plans: dict[int, Plan], redeal: Redeal | None, seed: int):
        self.plans, self.redeal, self.seed = plans, redeal, seed

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
        if order == "random":
            return tuple(sets[i] for i in torch.randperm(len(sets), generator=generator))
        return tuple(sets[(i - number) % len(sets)] for i in range(len(sets)))

    if not number:
        return plan
    return dataclasses.replace(plan, set_of_unit={name: permuted(sets) for name, sets in plan.set_of_unit.items()})
