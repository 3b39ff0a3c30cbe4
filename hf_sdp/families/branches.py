"""The residual branches of a layer, found in a recording of it.

A layer takes a stream and returns it, with the outputs of its branches added: ``x + f(norm(x))`` (pre-norm),
``norm(x + f(x))`` (post-norm), ``x + norm(f(norm(x)))``, or ``x + f(norm(x)) + g(norm(x))`` (parallel). From the
output back to the input, the stream is the operand of each sum that the other one is computed from.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .recording import Call, Operation, Recording

_SAME = {
    "view", "_unsafe_view", "clone", "detach", "_to_copy", "alias", "unsqueeze", "squeeze", "expand", "native_dropout",
    "clamp", "reshape", "contiguous",
}  # fmt: skip
"""Operations whose output is their first input, as it flows through a layer."""
_SCALED = {"mul", "mul_", "div", "div_"}
_SUMS = {"add", "add_"}


class NotASum(Exception):
    """The layer's output is not its input with something added."""


@dataclass(frozen=True)
class Branch:
    """What is added to the stream.

    Attributes:
        stream: the operation that made what it is added to.
        sums: what that makes, under all its names: the sum, and what only reshapes, casts or scales it.
        calls: numbers of the outermost calls that are within the branch alone, in forward order.
        around: numbers of calls that the branch's sum is in, from the inside: they return the stream.
    """

    stream: int
    sums: frozenset[int]
    calls: tuple[int, ...]
    around: tuple[int, ...]


def stream_of(call: Call) -> str:
    """The argument of a layer that is the stream: the first tensor. Raises NotASum."""
    for name, operation in call.arguments.items():
        if operation is not None:
            return name
    raise NotASum(f"{call.module} has no tensor among its arguments {sorted(call.arguments)}")


def branches(recording: Recording, number: int) -> list[Branch]:
    """The branches of the layer whose call is ``number``, in forward order. Raises NotASum."""
    return _Layer(recording, number).branches()


def summands(recording: Recording, number: int) -> list[tuple[int, ...]]:
    """Of a layer whose last sum has no stream (a shortcut that changes the shape): for each operand the numbers of the
    outermost calls that are within it alone, in forward order. Raises NotASum."""
    return _Layer(recording, number).summands()


class _Layer:
    def __init__(self, recording: Recording, number: int):
        self.recording, self.number = recording, number
        self.call = recording.calls[number]
        self.first, self.last = self.call.first, self.call.last
        start = self.call.arguments[stream_of(self.call)]
        assert start is not None
        self.start: int = start
        self.before: dict[int, int] = {start: 1}  # operation -> bits of those that it is computed from, itself included
        for n in range(self.first, self.last):
            bits = 0
            for i in recording.operations[n].inputs:
                bits |= self.before.get(i, 0)
            self.before[n] = bits | self._bit(n) if bits else 0
        after = range(number + 1, len(recording.calls))
        self.calls = list(itertools.takewhile(lambda n: number in recording.within(n), after))
        self.norms: dict[int, Call] = {}  # output -> a call of a module that has vectors only
        for n in self.calls:
            call = recording.calls[n]
            output = call.outputs[0].operation if call.outputs else None
            if output is not None and call.first <= output < call.last and not self._has_matrix(call):
                self.norms.setdefault(output, call)

    def _bit(self, n: int) -> int:
        return 1 << (n - self.first + 1)

    def _mask(self, call: Call) -> int:
        return (1 << (call.last - self.first + 1)) - (1 << (call.first - self.first + 1))

    def _has_matrix(self, call: Call) -> bool:
        return any(p in self.recording.matrices for n in range(call.first, call.last) for p in self._reads(n))

    def _reads(self, n: int) -> tuple[str, ...]:
        return self.recording.operations[n].parameters

    def branches(self) -> list[Branch]:
        output = self.call.outputs[0].operation
        if output is None or not self.before.get(output):
            raise NotASum(f"what {self.call.module} returns is not computed from its {stream_of(self.call)}")
        found: list[tuple[int, frozenset[int], int]] = []  # stream, the sum's names, operation that is added
        on_stream = 0  # sums, and norms of the stream
        while (named := frozenset(self._names(output))) and (output := self._same(output)) != self.start:
            operation = self.recording.operations[output]
            if operation.name in _SUMS and len([i for i in operation.inputs if self.before.get(i)]) > 1:
                stream, added, sums = self._stream_of_sum(output)
                for operand in reversed(added):
                    found += [(stream, named, branch) for branch in reversed(self._parallel(operand))]
                on_stream |= sums
            elif output in self.norms:
                norm = self.norms[output]
                on_stream |= self._mask(norm)
                stream = self._input(norm)
            else:
                raise NotASum(f"{self.call.module}: what it returns comes from {operation.name}, which is no sum")
            output = stream
        found.reverse()
        exclusive = [self.before[added] & ~self.before[stream] & ~on_stream for stream, _, added in found]
        result = []
        for index, (stream, sums_of_it, _) in enumerate(found):
            others = on_stream
            for other, bits in enumerate(exclusive):
                if other != index:
                    others |= bits
            own = exclusive[index] & ~others
            around = tuple(self._around(min(sums_of_it)))
            result.append(Branch(stream, sums_of_it, tuple(self._outermost(own, others)), around))
        return sorted(result, key=lambda branch: branch.calls)

    def summands(self) -> list[tuple[int, ...]]:
        output = self.call.outputs[0].operation
        while output is not None and self.before.get(output):
            output = self._same(output)
            if self.recording.operations[output].name in _SUMS:
                operands = self._operands(output)
                others = [_union(self.before[n] for n in operands if n != operand) for operand in operands]
                return [
                    tuple(self._outermost(self.before[operand] & ~other, other))
                    for operand, other in zip(operands, others, strict=True)
                ]
            output = self._input(self.norms[output]) if output in self.norms else None
        return []

    def _same(self, n: int) -> int:
        """Where a tensor comes from through operations that only reshape, cast or scale it."""
        return list(self._names(n))[-1]

    def _names(self, n: int) -> Iterator[int]:
        """The operation itself, and those before it up to :meth:`_same`."""
        yield n
        while n != self.start:
            operation = self.recording.operations[n]
            through = [i for i in operation.inputs if self.before.get(i)]
            if len(through) != 1 or not (operation.name in _SAME or self._only_scales(operation)):
                return
            if operation.parameters and n in self.norms:  # the last operation of a norm
                return
            n = through[0]
            yield n

    def _only_scales(self, operation: Operation) -> bool:
        """By a number, or each feature by a parameter (also: shifts it)."""
        if operation.name not in _SCALED | _SUMS:
            return False
        if operation.parameters:
            vectors = not self.recording.matrices & set(operation.parameters)
            return vectors and len(operation.inputs) == len(operation.parameters) == 1
        return operation.is_scaling

    def _input(self, norm: Call) -> int:
        for operation in norm.arguments.values():
            if operation is not None and self.before.get(operation):
                return operation
        raise NotASum(f"{norm.module} is not computed from the stream")

    def _stream_of_sum(self, total: int) -> tuple[int, list[int], int]:
        """The operand that all others are computed from, these, and the sums between."""
        operands, sums = self._operands(total), self._bit(total)
        while True:
            for n in operands:
                others = [other for other in operands if other != n]
                origin = self._same(n)
                bit = 1 if origin == self.start else self._bit(origin)
                if all(self.before[other] & bit for other in others):
                    return origin, others, sums
            for place, n in enumerate(operands):
                inner = self._same(n)
                if inner != self.start and self.recording.operations[inner].name in _SUMS:
                    operands[place : place + 1] = self._operands(inner)
                    sums |= self._bit(inner)
                    break
            else:
                raise NotASum(f"{self.call.module}: no operand of a sum is what the others are computed from")

    def _parallel(self, added: int) -> list[int]:
        """The layer itself may add up what its modules compute side by side."""
        inner = self._same(added)
        operation = self.recording.operations[inner]
        if operation.name in _SUMS and operation.call == self.number and len(operands := self._operands(inner)) > 1:
            return [branch for operand in operands for branch in self._parallel(operand)]
        return [added]

    def _operands(self, n: int) -> list[int]:
        return [i for i in self.recording.operations[n].inputs if self.before.get(i)]

    def _outermost(self, own: int, others: int) -> Iterator[int]:
        done = 0
        for n in self.calls:
            mask = self._mask(self.recording.calls[n])
            if mask & own and not mask & others and not mask & done:
                done |= mask
                yield n

    def _around(self, total: int) -> Iterator[int]:
        for n in self.recording.within(self.recording.operations[total].call):
            if n == self.number:
                return
            yield n


def _union(all_bits: Iterable[int]) -> int:
    result = 0
    for bits in all_bits:
        result |= bits
    return result
