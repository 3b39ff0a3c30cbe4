"""What a sharding engine allocates and frees over a step, around the computation, is counted here.

The engines (``fully_shard.py``, ``replicated.py``) are driven by the marks of a trace, the moments at which FSDP2's
hooks run. Every formula with its source: ``FORMULAS.md``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass


@dataclass(frozen=True)
class WorkerMemory:
    """Bytes of one worker.

    Attributes:
        parameters, gradients, optimizer: the state it stores: its shards, with gradients after backward.
        gathered: the most over the step: gathered parameters (or copies in another dtype) and all-gather buffers.
        activations: the most over the step: saved tensors and temporaries.
        gathered_at_peak, activations_at_peak: the same at the moment of the peak.
        gradients_at_peak: gradients so far, sharded or not, and buffers of their reduction.
        peak: parameters + optimizer + the three at the peak.
    """

    parameters: int
    gathered: int
    gradients: int
    optimizer: int
    activations: int
    gathered_at_peak: int
    activations_at_peak: int
    gradients_at_peak: int
    peak: int


@dataclass(frozen=True)
class Action:
    """One thing in the order in which a worker starts them. ``kind``: "compute" (``amount`` in FLOPs), "gather" or
    "reduce" (bytes sent by this worker), "wait" (for the gather of ``group``)."""

    kind: str
    amount: int = 0
    group: int = -1


class Allocator(ABC):
    """Counts bytes by kind, and keeps them as they are at the peak."""

    parameters = gradients_stored = optimizer = 0  # state

    def __init__(self):
        self.activations = self.gathered = self.gradients = 0
        self.actions: list[Action] = []
        self._peak, self._at_peak = -1, (0, 0, 0)
        self._most_gathered = self._most_activations = 0

    def note(self, temporary: int = 0) -> None:
        """``temporary``: further bytes of activations, for a moment."""
        self._most_gathered = max(self._most_gathered, self.gathered)
        self._most_activations = max(self._most_activations, self.activations + temporary)
        total = self.activations + temporary + self.gathered + self.gradients
        if total > self._peak:
            self._peak = total
            self._at_peak = (self.gathered, self.activations + temporary, self.gradients)

    @abstractmethod
    def mark(self, kind: str, module: str) -> None:
        """A moment at which one of FSDP2's hooks runs (``recorder.Mark``)."""

    @abstractmethod
    def gradient(self, name: str, nbytes: int) -> None:
        """The gradient of a parameter is complete; it was counted among the activations until now."""

    def result(self) -> WorkerMemory:
        gathered, activations, gradients = self._at_peak
        return WorkerMemory(
            parameters=self.parameters,
            gathered=self._most_gathered,
            gradients=self.gradients_stored,
            optimizer=self.optimizer,
            activations=self._most_activations,
            gathered_at_peak=gathered,
            activations_at_peak=activations,
            gradients_at_peak=gradients,
            peak=self.parameters + self.optimizer + self._peak,
        )
