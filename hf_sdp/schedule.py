"""A coverage schedule: one training in phases, each with a plan of its own.

A training that begins with small subnetworks and ends with the full model spends its early steps cheaply, and its last
ones on what is evaluated.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

from . import options
from .errors import SDPConfigError
from .options import option
from .workload import Workload

_EXAMPLE = "[(0.0, 0.5), (0.6, 1.0)], in text 0:0.5,0.6:1"


@dataclass(frozen=True)
class Phase:
    """One phase of a training. None: as the ``SDPConfig`` says.

    Raises: SDPConfigError for a value out of range.
    """

    start: float = option("Share of the training at which it begins, in [0, 1).")
    coverage: float | None = option("Share C; a coverage_schedule says it of each phase.", default=None)
    level: Literal["neuron", "block"] | None = option("As in SDPConfig.", default=None)
    masking: Literal["forward", "backward"] | None = option("As in SDPConfig.", default=None)
    depth_profile: Literal["uniform", "linear"] | None = option("As in SDPConfig.", default=None)
    gradient_checkpointing: bool = option(
        "Decoder layers are recomputed in backward, in this phase alone: less memory.", default=False
    )
    splits: int = option(
        "Under the Trainer, pieces in which each micro-batch is computed: fewer activations, as many tokens a step.",
        default=1,
        positive=True,
    )

    def __post_init__(self):
        options.check(self)
        given = {"start": self.start} | ({} if self.coverage is None else {"coverage": self.coverage})
        for name, value in given.items():
            if not isinstance(value, Real) or isinstance(value, bool):
                raise SDPConfigError(f"{name} of a phase must be a number, got {value!r}.")
        if not 0 <= self.start < 1:
            raise SDPConfigError(f"start of a phase must be in [0, 1), a share of the training, got {self.start!r}.")

    @classmethod
    def parse(cls, text: str) -> "Phase":
        """From ``START:COVERAGE`` with options after it, as ``0.6:0.5:masking=backward``."""
        start, colon, rest = text.strip().partition(":")
        coverage, _, others = rest.partition(":")
        try:
            if not colon:
                raise ValueError
            values: dict[str, Any] = {"start": float(start), "coverage": float(coverage)}
        except ValueError:
            raise SDPConfigError(f"{text!r} is no phase. Write a schedule as {_EXAMPLE}.") from None
        if others:
            fields = [field for field in dataclasses.fields(cls) if field.name not in values]
            example = "0.6:0.5:masking=backward"
            values |= options.parse_all(fields, others.replace(":", ","), what="phase", example=example)
        return cls(**values)

    @classmethod
    def of(cls, given: object) -> "Phase":
        """From a phase, its text, its fields by name, or a pair ``(start, coverage)`` or ``(start, fields)``."""
        if isinstance(given, cls):
            return given
        if isinstance(given, str):
            return cls.parse(given)
        try:
            if isinstance(given, Mapping):
                return cls(**given)
            if isinstance(given, Sequence) and len(given) == 2:
                start, other = given
                return cls(start, **other) if isinstance(other, Mapping) else cls(start, other)
        except TypeError as error:
            raise SDPConfigError(f"{given!r} is no phase: {error}.") from None
        raise SDPConfigError(f"{given!r} is no phase. Write a schedule as {_EXAMPLE}.")

    @property
    def changes(self) -> dict[str, Any]:
        """Options of SDPConfig that this phase sets, by name."""
        given = {name: getattr(self, name) for name in ("coverage", "level", "masking", "depth_profile")}
        return {name: value for name, value in given.items() if value is not None}

    def pieces_of(self, workload: Workload) -> int:
        """In how many pieces a worker computes its micro-batch in this phase."""
        return min(self.splits, workload.batch)

    def workload_of(self, workload: Workload) -> Workload:
        """What a worker computes at a time in this phase: the largest piece."""
        checkpoints = workload.gradient_checkpointing or self.gradient_checkpointing
        return dataclasses.replace(
            workload, batch=-(-workload.batch // self.splits), gradient_checkpointing=checkpoints
        )


def phases_of(given: object) -> tuple[Phase, ...]:
    """From text, or a list of what :meth:`Phase.of` takes.

    Raises: SDPConfigError for what is no schedule, or not in order.
    """
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, Sequence) or isinstance(given, bytes):
        raise SDPConfigError(f"coverage_schedule must be a list such as {_EXAMPLE}, got {given!r}.")
    phases = tuple(Phase.of(one) for item in given for one in (item.split(",") if isinstance(item, str) else [item]))
    starts = [phase.start for phase in phases]
    if not phases or starts[0] != 0 or any(a >= b for a, b in zip(starts, starts[1:], strict=False)):
        raise SDPConfigError(
            f"coverage_schedule must begin at 0, and each phase after the one before it, got starts {starts}."
        )
    if any(phase.coverage is None for phase in phases):
        raise SDPConfigError(f"coverage_schedule: each phase must have a coverage, as in {_EXAMPLE}.")
    for before, after in zip(phases, phases[1:], strict=False):
        if dataclasses.replace(before, start=after.start) == after:
            raise SDPConfigError(f"coverage_schedule: the phase from {after.start:g} is as the one before it.")
    return phases


def first_steps(starts: Sequence[float], costs: Sequence[float], num_steps: int) -> list[int]:
    """The first step of each phase, counted from 0, of a training of ``num_steps``.

    Args:
        starts: share at which each begins: of what all steps cost together.
        costs: of a step of each phase, in any unit. With equal costs the shares are of the steps.
    """
    steps = steps_for_one(starts, costs)
    return [round(num_steps * sum(steps[:number]) / sum(steps)) for number in range(len(steps))]


def steps_for_one(starts: Sequence[float], costs: Sequence[float]) -> list[float]:
    """Steps of each phase, of a training whose steps cost one unit together; arguments as of :func:`first_steps`."""
    ends = [*starts[1:], 1.0]
    return [(end - start) / cost for start, end, cost in zip(starts, ends, costs, strict=True)]
