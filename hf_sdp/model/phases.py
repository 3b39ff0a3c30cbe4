"""The phases of a training, planned: what is known of a coverage schedule once it has a model."""

from dataclasses import dataclass, field
from typing import Any

from ..config import SDPConfig
from ..errors import SDPConfigError, SDPStateError
from ..plan.plan import Plan
from ..schedule import Phase, first_steps
from ..world.agreement import raised_by_all
from .changes import Changes


@dataclass(frozen=True)
class Planned:
    """A phase with its plan.

    Attributes:
        config: of this phase alone.
        cost: of a step, in the unit that the starts are shares of: FLOPs, or 1.
    """

    phase: Phase
    config: SDPConfig
    plan: Plan
    cost: float = 1.0


@dataclass
class Schedule:
    """Of one patched model.

    Attributes:
        config: as the user gave it.
        number: of the phase that the model is in.
        changes: what was done to its modules for this phase, newest last.
        recomputes: what a phase's ``gradient_checkpointing`` has set in the model to recompute its layers.
        asked: for which step anybody has asked for the phase last; None: for none.
        resumed: phase of the checkpoint of this schedule that was loaded last, on rank 0, until the next step.
        is_between_steps: whether it was seen that a step leaves nothing to the next one that a boundary would lose.
        host_splits: whether the host computes micro-batches in the pieces that a phase says.
    """

    config: SDPConfig
    phases: tuple[Planned, ...]
    number: int = 0
    changes: list[Changes] = field(default_factory=list)
    recomputes: Any = None
    asked: int | None = None
    resumed: int | None = None
    is_between_steps: bool = False
    host_splits: bool = False

    @property
    def current(self) -> Planned:
        return self.phases[self.number]

    def refuse_unfollowed(self, model_name: str) -> None:
        """Raises SDPStateError when the model learns and nobody has asked for the phase: it would stay in its first
        one. To be called on all workers."""
        if self.asked is not None or len(self.phases) == 1:
            return
        raise raised_by_all(
            SDPStateError(
                f"{model_name} has a coverage_schedule that nobody follows: it would stay in its first phase. A "
                "Trainer needs SDPCallback(). A loop of your own, or of a script, has to call "
                "accelerator.follow_schedule(step, num_steps), or hf_sdp.follow_schedule, before each step."
            )
        )

    def first_steps(self, num_steps: int) -> list[int]:
        """Of each phase, counted from 0. Raises: SDPConfigError when a phase has no step."""
        first = first_steps([p.phase.start for p in self.phases], [p.cost for p in self.phases], num_steps)
        lengths = [end - start for start, end in zip(first, [*first[1:], num_steps], strict=True)]
        if min(lengths) < 1:
            raise SDPConfigError(
                f"coverage_schedule: of {num_steps} training steps the phases get {lengths}. Each needs one: train for "
                "longer, or leave a phase out."
            )
        return first

    def phase_at(self, step: int, num_steps: int) -> int:
        """Number of the phase of a step, counted from 0."""
        return max(number for number, first in enumerate(self.first_steps(num_steps)) if first <= step)
