"""FSDP2: what its groups allocate, free and send over a step, of plain FSDP2 and of SDP."""

from collections.abc import Iterable

from ..plan.groups import ROOT
from ..workload import DTYPES, OPTIMIZER_STATES, Workload
from ..world.ring import BOTH_WAYS, sent_in_ring
from .allocations import Action, Allocator
from .groups import StoredGroup


class FullyShard(Allocator):
    """What ``_fsdp_param_group.py`` and ``_fsdp_collectives.py`` allocate and free, in their order.

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
        sent = (group.members - 1) * shard + int(sent_in_ring(shard, group.replicas, BOTH_WAYS))
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
