"""Predicted time of a step: a model, not a measurement.

Two queues. Computation runs in order at the given FLOP/s. Communication runs in order, one collective at a time, at the
given bandwidth. A ring sends and receives at once, so a collective takes what this worker sends, divided by the
bandwidth. A gather starts as soon as the collective before it is done, a reduction when the computation before it is
done. Computation waits for the gather of what it needs, and the optimizer for everything. Left out: latency, kernels
that are bound by memory, the optimizer's own time, other workers that are slower.
"""

from dataclasses import dataclass

from .memory import Step


@dataclass(frozen=True)
class StepTime:
    """Seconds. ``exposed``: of communication, during which nothing is computed; ``total`` = compute + exposed."""

    compute: float
    communication: float
    exposed: float

    @property
    def total(self) -> float:
        return self.compute + self.exposed


def step_time(step: Step, *, bandwidth: float, flops: float) -> StepTime:
    """Time of one worker's step.

    Args:
        bandwidth: bytes per second that a worker sends while it receives as many.
        flops: FLOP/s that the device reaches, not its peak.
    """
    computed = sent = 0.0  # when each queue is free
    gathered: dict[int, float] = {}
    busy = communication = 0.0
    for action in step.actions:
        if action.kind == "compute":
            computed += action.amount / flops
            busy += action.amount / flops
        elif action.kind == "wait":
            computed = max(computed, gathered.get(action.group, 0.0))
        else:
            start = max(sent, computed) if action.kind == "reduce" else sent
            sent = start + action.amount / bandwidth
            communication += action.amount / bandwidth
            if action.kind == "gather":
                gathered[action.group] = sent
    return StepTime(compute=busy, communication=communication, exposed=max(computed, sent) - busy)
