"""What a sharding engine allocates and frees over a step, around the computation: FSDP2, DDP, ZeRO.

Driven by the marks of a trace, the moments at which FSDP2's hooks run. Every formula with its source: ``FORMULAS.md``.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

from ..plan.groups import ROOT
from ..workload import DTYPES, OPTIMIZER_STATES, Workload
from ..world.ring import BOTH_WAYS, ONE_WAY, sent_in_ring
from .groups import StoredGroup
from .shapes import ModelShapes
from .trace import TRACED_LAYERS

DDP_BUCKET_BYTES = 25 * 2**20


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

    @property
    def state(self) -> int:
        return self.parameters + self.gradients + self.optimizer


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


class FullyShard(Allocator):
    """FSDP2: what ``_fsdp_param_group.py`` and ``_fsdp_collectives.py`` allocate and free, in their order.

    Args:
        prefetches: in backward, as FSDP2 does by default.
        with_root: modules whose groups are gathered when forward begins (``engine.fsdp.gather_with_root``).
        accumulates: there are reduced gradients already, to which those of this micro-batch are added.
    """

    def __init__(
        self,
        groups: list[StoredGroup],
        workload: Workload,
        reshard_after_forward: bool,
        *,
        prefetches: bool,
        with_root: Iterable[str] = (),
        accumulates: bool = False,
    ):
        super().__init__()
        self.groups, self.accumulates = groups, accumulates
        self.prefetches = prefetches
        self.with_root = tuple(with_root)
        self.reshards = reshard_after_forward  # also the root: only reshard_after_forward=None makes an exception of it
        self.stored_bytes, self.computed_bytes = DTYPES[workload.param_dtype], DTYPES[workload.dtype]
        self.frozen_bytes = DTYPES[workload.dtype_of_frozen]
        self.gradients_stored = sum(group.learned_numel for group in groups) * self.stored_bytes
        frozen_numel = sum(group.stored_numel - group.learned_numel for group in groups)
        self.parameters = self.gradients_stored + frozen_numel * self.frozen_bytes
        self.optimizer = self.gradients_stored * OPTIMIZER_STATES[workload.optimizer]
        self.gradients = self.gradients_stored if accumulates else 0
        self._by_module: dict[str, list[int]] = {}
        for index, group in enumerate(groups):
            for module in group.group.modules:
                self._by_module.setdefault(module, []).append(index)
        self._left_to_run: list[set[str]] = [set() for _ in groups]  # of the modules of a group, since the first ran
        self._first_to_run, self._last_to_run = [""] * len(groups), [""] * len(groups)
        self._by_parameter = {name: index for index, group in enumerate(groups) for name in group.group.tensors}
        self._gathered = [False] * len(groups)
        self._prefetched: dict[int, int] = {}  # group -> bytes of its all-gather output
        self._kept_output = 0  # that of the last gathered group, in forward
        self._gradients = [0] * len(groups)
        self._reduced = [False] * len(groups)
        self._in_backward = [False] * len(groups)
        self._order: list[int] = []  # of the ends of forward
        self._last_reduce_input = 0
        self._kept_for_all_reduce = 0
        self._backward_began = False

    def mark(self, kind: str, module: str) -> None:
        if kind == "end":
            for index in self._final_order():
                self._reduce(index)
            self.gradients -= self._last_reduce_input + self._kept_for_all_reduce
            return
        for index in self._by_module.get(module, ()):
            if kind == "pre_forward":
                if self._left_to_run[index]:
                    continue
                self._left_to_run[index] = set(self.groups[index].group.modules)
                self._first_to_run[index] = module
                self._gather(index, keep_output=not self._in_backward[index])
                if module == ROOT:
                    for early in (i for name in self.with_root for i in self._by_module[name]):
                        self._gather(early, keep_output=False)
            elif kind == "post_forward":
                self._left_to_run[index].discard(module)
                if self._left_to_run[index] or self._backward_began:
                    continue
                self._last_to_run[index] = module
                self._order.append(index)
                if self.reshards:
                    self._reshard(index)
                if module == ROOT:
                    self.gathered -= self._kept_output
                    self._kept_output = 0
            elif kind == "pre_backward" and module == self._last_to_run[index] and not self._in_backward[index]:
                self._backward_began = self._in_backward[index] = True
                self._gather(index, keep_output=False)
                if self.prefetches:
                    self._prefetch_before(index)
            elif kind == "post_backward" and module == self._first_to_run[index]:
                self._reduce(index)

    def gradient(self, name: str, nbytes: int) -> None:
        self._gradients[self._by_parameter[name]] += nbytes
        self.gradients += nbytes

    def _final_order(self) -> list[int]:
        """Groups whose inputs have no gradient: root first, then in the order of modules."""
        left = [index for index in range(len(self.groups)) if not self._reduced[index]]
        return sorted(left, key=lambda index: self.groups[index].group.modules != (ROOT,))

    def _start_gather(self, index: int) -> int:
        """Allocates the output of the all-gather (and, for a moment, its input in another dtype)."""
        group = self.groups[index]
        if group.members == 1 or not group.group.tensors:
            return 0
        output = group.gathered_numel * self.computed_bytes
        self.gathered += output
        if cast := self._cast_numel(group) * self.computed_bytes:
            self.gathered += cast
            self.note()
            self.gathered -= cast
        self.note()
        self.actions.append(Action("gather", (group.members - 1) * group.shard_numel * self.computed_bytes, index))
        return output

    def _cast_numel(self, group: StoredGroup) -> int:
        """Elements of a shard that are stored in another dtype than they are gathered in."""
        frozen_numel = group.shard_numel - group.reduced_numel
        learned_are_cast, frozen_are_cast = (b != self.computed_bytes for b in (self.stored_bytes, self.frozen_bytes))
        return group.reduced_numel * learned_are_cast + frozen_numel * frozen_are_cast

    def _gather(self, index: int, *, keep_output: bool) -> None:
        group = self.groups[index]
        if self._gathered[index] or not group.group.tensors:
            return
        output = self._prefetched.pop(index) if index in self._prefetched else self._start_gather(index)
        self.gathered += group.gathered_numel * self.computed_bytes
        if group.members == 1 and self._cast_numel(group):
            self.note(group.largest_numel * self.computed_bytes)
        self.note()
        if keep_output:  # that of the group before goes only when wait_for_unshard returns: a local variable has it
            self.gathered -= self._kept_output
            self._kept_output = 0
        self._gathered[index] = True
        if group.members > 1:
            self.actions.append(Action("wait", group=index))
        if keep_output and group.members > 1:
            self._kept_output = output
        else:
            self.gathered -= output

    def _prefetch_before(self, index: int) -> None:
        position = self._order.index(index)
        if position == 0:
            return
        before = self._order[position - 1]
        if not self._gathered[before] and before not in self._prefetched:
            self._prefetched[before] = self._start_gather(before)

    def _reshard(self, index: int) -> None:
        if self._gathered[index]:
            self.gathered -= self.groups[index].gathered_numel * self.computed_bytes
            self._gathered[index] = False

    def _reduce(self, index: int) -> None:
        if self._reduced[index]:
            return
        group = self.groups[index]
        self._reduced[index] = True
        self._reshard(index)
        self.gradients -= self._last_reduce_input
        self._last_reduce_input = 0
        if not self._gradients[index]:
            return
        shard = group.reduced_numel * self.computed_bytes
        self._last_reduce_input = group.members * shard
        padded = group.padded_numel * self.computed_bytes  # copies, for the moment in which the input is written
        self.gradients += self._last_reduce_input + padded
        self.note()
        self.gradients -= self._gradients[index] + padded
        self._gradients[index] = 0
        self.gradients += shard
        self.note()
        sent = (group.members - 1) * shard + 2 * (group.replicas - 1) * shard // group.replicas
        self.actions.append(Action("reduce", sent, index))
        if self.stored_bytes != self.computed_bytes:
            self.gradients += group.reduced_numel * self.stored_bytes
            self.note()
            if group.replicas > 1:
                self._kept_for_all_reduce += shard  # until the end of backward
            else:
                self.gradients -= shard
        if self.accumulates:
            self.gradients -= group.reduced_numel * self.stored_bytes


class Replicated(Allocator):
    """DDP and ZeRO stages 1 and 2: all parameters everywhere, gradients reduced in buckets as they come."""

    def __init__(self, shapes: ModelShapes, workload: Workload, world_size: int, zero_stage: int):
        super().__init__()
        self.world_size, self.zero_stage = world_size, zero_stage
        self._untraced_copies = 0
        numel = sum(map(math.prod, shapes.tensors.values()))
        learned = sum(math.prod(shape) for name, shape in shapes.tensors.items() if name not in shapes.frozen)
        stored_bytes, computed_bytes = DTYPES[workload.param_dtype], DTYPES[workload.dtype]
        mixed = stored_bytes != computed_bytes
        num_states = OPTIMIZER_STATES[workload.optimizer]
        if zero_stage == 0:
            self.gradients_stored = learned * stored_bytes
            self.parameters = self.gradients_stored + (numel - learned) * DTYPES[workload.dtype_of_frozen]
            self.optimizer = self.gradients_stored * num_states
            self.gradients = self.gradients_stored  # the buckets
            self.share = 1
            if mixed and workload.gradient_checkpointing and not shapes.is_traced_whole:
                # Autocast's copies of the weights go when forward ends; the trace has seen those of few layers.
                layers = shapes.structure.layers
                learned_of_first = (
                    s
                    for name, s in shapes.tensors.items()
                    if name.startswith(layers[0] + ".") and len(s) == 2 and name not in shapes.frozen
                )
                of_first = sum(map(math.prod, learned_of_first))
                self._untraced_copies = (len(layers) - TRACED_LAYERS) * of_first * computed_bytes
        else:
            # ZeRO: parameters and gradients in the dtype of computation; the sharded optimizer has the stored ones
            shard = -(-learned // world_size)
            self.parameters = numel * computed_bytes
            self.gradients_stored = (learned if zero_stage == 1 else shard) * computed_bytes
            self.optimizer = shard * stored_bytes * (num_states + mixed)
            self.share = 1 if zero_stage == 1 else world_size
        self._bucket = 0
        self.updated_bytes = learned * computed_bytes

    def gradient(self, name: str, nbytes: int) -> None:
        self.gradients += nbytes
        self._bucket += nbytes
        if self._bucket >= DDP_BUCKET_BYTES:
            self._send()

    def _send(self) -> None:
        self.note()
        self.gradients -= self._bucket - self._bucket // self.share
        rounds = BOTH_WAYS if self.zero_stage == 0 else ONE_WAY
        self.actions.append(Action("reduce", int(sent_in_ring(self._bucket, self.world_size, rounds))))
        self._bucket = 0

    def mark(self, kind: str, module: str) -> None:
        if kind == "end_of_forward":
            self.activations -= self._untraced_copies
        if kind != "end":
            return
        if self._bucket:
            self._send()
        if self.zero_stage > 0:  # the updated parameters, after the optimizer's step
            self.actions.append(Action("reduce", int(sent_in_ring(self.updated_bytes, self.world_size, ONE_WAY))))
