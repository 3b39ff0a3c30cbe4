"""The blocks of a model, found in a recording of it, and what is left when they are left out.

What is found is tried: each layer is called once more, on the meta device, with a block left out.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from .absent import ZERO, ZEROS, Absent, Outputs
from .base import Block
from .branches import Branch, NotASum, branches, stream_of, summands
from .kinds import ATTENTION, CROSS_ATTENTION, EXPERTS, MIXER, MLP, Kind
from .layers import likeness
from .recording import Call, Recording, call_again
from .registered import Family
from .stacks import layers

_KINDS: tuple[tuple[str, Kind], ...] = (
    (r"ffn|feed_?forward", MLP),
    (r"(enc|cross).*att|cross_?attention", CROSS_ATTENTION),
    (r"lin(ear)?_?att|mamba|mixer|conv|recurrent|rglru|temporal_block|lstm|delta", MIXER),
    (r"att", ATTENTION),
)
"""Pattern of the name of a module within its layer, or of its class -> kind. All else is an MLP, or has experts."""


@dataclass
class Found:
    """As the fields of ``Structure``."""

    layers: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    absent: dict[str, Outputs] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    summands: list[Block] = field(default_factory=list)


def find_blocks(model: nn.Module, recording: Recording, family: Family) -> Found:
    """``model``: the one that was recorded; on the meta device. Raises: SDPConfigError for names that it has not."""
    return _Finder(model, recording, family).find()


class _Finder:
    def __init__(self, model: nn.Module, recording: Recording, family: Family):
        self.model, self.recording, self.family = model, recording, family
        self.modules = dict(model.named_modules())
        self.found = Found()
        self.readers: dict[int, list[int]] = {}  # operation -> those that read its result
        for number, operation in enumerate(recording.operations):
            for made in operation.inputs:
                self.readers.setdefault(made, []).append(number)
        self.calls_of = recording.calls_of()
        self.read_in: dict[str, set[int]] = {}  # parameter -> innermost calls that read it
        for operation in recording.operations:
            for name in operation.parameters:
                self.read_in.setdefault(name, set()).add(operation.call)
        names = model.named_parameters(remove_duplicate=False)
        self.names_of: dict[int, list[str]] = {}
        for name, p in names:
            self.names_of.setdefault(id(p), []).append(name)
        self.tried: dict[tuple, str | None] = {}

    def find(self) -> Found:
        for number, name in layers(self.model, self.recording, self.family):
            index = len(self.found.layers)
            self.found.layers.append(name)
            call = self.recording.calls[number]
            try:
                found = branches(self.recording, number)
            except NotASum as error:
                self.found.kept[name] = str(error)
                with contextlib.suppress(NotASum):
                    self._find_summands(index, name, summands(self.recording, number))
                continue
            self._leave_out_layer(name, call)
            for branch in found:
                self._leave_out_branch(index, name, call, branch)
        return self.found

    def _leave_out_layer(self, name: str, call: Call) -> None:
        """A layer that is left out passes the stream on."""
        stream = stream_of(call)
        outputs = self._outputs(call, stream)
        problem = self._said(name) or self._of_all(name) or self._read_outside((name,)) or self._used_outside((name,))
        problem = problem or (outputs if isinstance(outputs, str) else None)
        if problem:
            self.found.kept[name] = problem
        else:
            assert isinstance(outputs, Outputs)
            self.found.absent[name] = outputs

    def _said(self, name: str) -> str | None:
        return f"{name} is held by all, as was registered" if self.family.keeps(name) else None

    def _leave_out_branch(self, index: int, layer: str, layer_call: Call, branch: Branch) -> None:
        problems: dict[str, str] = {}
        for chosen in self._candidates(layer, branch):
            names = tuple(call.module for call, _ in chosen)
            main = next((name for name in names if self._has_matrix(name)), None)
            if main is None:
                continue  # nothing is computed with weights
            absent: dict[str, Outputs] = {}
            problem = self._said(main) or self._read_outside(names) or self._used_outside(names)
            for call, item in chosen:
                outputs = self._outputs(call, item, names)
                if isinstance(outputs, str):
                    problem = outputs
                    break
                absent[call.module] = outputs
            problem = problem or self._try(layer, layer_call, absent)
            if problem is None:
                self.found.absent |= absent
                self.found.blocks.append(Block(self._kind(layer, main).name, index, names, main))
                return
            problems.setdefault(main, problem)
        self.found.kept |= problems

    def _find_summands(self, index: int, layer: str, found: list[tuple[int, ...]]) -> None:
        for calls in found:
            names = tuple(self.recording.calls[n].module for n in calls if self._has_parameters(n))
            main = next((name for name in names if self._has_matrix(name)), None)
            if main is not None and not any(self._is_shared(layer, name) for name in names):
                if not (self._said(main) or self._read_outside(names) or self._used_outside(names)):
                    self.found.summands.append(Block(self._kind(layer, main).name, index, names, main))

    def _candidates(self, layer: str, branch: Branch) -> Iterator[list[tuple[Call, str]]]:
        """Calls to leave out, and what each then returns: only what the branch has itself, with its norms or without
        (all hold them then); or a module with the sum in it, which then passes the stream on."""
        own = [self.recording.calls[n] for n in branch.calls if self._has_parameters(n)]
        own = [call for call in own if not self._is_shared(layer, call.module)]
        for chosen in (own, [call for call in own if self._has_matrix(call.module)]):
            for zero in (ZERO, ZEROS):
                yield [(call, zero if self._has_matrix(call.module) else stream_of(call)) for call in chosen]
        for number in branch.around:
            around = self.recording.calls[number]
            passed = next((name for name, made in around.arguments.items() if made == branch.stream), None)
            # Not where a norm in it comes after the sum: it would be left out with it.
            is_sum = bool(around.outputs) and around.outputs[0].operation in branch.sums
            if passed is not None and is_sum and not self._is_shared(layer, around.module):
                before = [call for call in own if call.last <= around.first and not self._has_matrix(call.module)]
                yield [*((call, stream_of(call)) for call in before), (around, passed)]

    def _read_outside(self, names: tuple[str, ...]) -> str | None:
        """Whether a parameter of these modules is read where none of them is called: there it would be missing."""
        for name in names:
            for own, _ in self.modules[name].named_parameters():
                for call in self.read_in.get(f"{name}.{own}", ()):
                    if not any(self.recording.calls[n].module in names for n in self.recording.within(call)):
                        return f"{name}.{own} is read outside of {name}"
        return None

    def _has_parameters(self, number: int) -> bool:
        return any(True for _ in self.modules[self.recording.calls[number].module].parameters())

    def _has_matrix(self, name: str) -> bool:
        return any(p.dim() > 1 for p in self.modules[name].parameters())

    def _is_shared(self, layer: str, name: str) -> bool:
        """Whether several layers use it, or one in several places. (A layer itself may be called several times.)"""
        return len(self.calls_of[name]) > len(self.calls_of[layer]) or bool(self._of_all(name))

    def _of_all(self, name: str) -> str | None:
        for own, parameter in self.modules[name].named_parameters():
            others = [n for n in self.names_of[id(parameter)] if not n.startswith(name + ".")]
            if others:
                return f"{name}.{own} is also {others[0]}"
        return None

    def _kind(self, layer: str, name: str) -> Kind:
        module = self.modules[name]
        other = EXPERTS if any("expert" in n for n, _ in module.named_modules()) else MLP
        for text in (name.removeprefix(layer + "."), type(module).__name__):
            for pattern, kind in _KINDS:
                if re.search(pattern, text, re.IGNORECASE):
                    # Convolutions of images compute with each place and those beside it: no mixer of a sequence.
                    of_images = any(isinstance(m, nn.Conv2d) for m in module.modules())
                    is_other = kind is MLP or kind is MIXER and (other is EXPERTS or of_images)
                    return other if is_other else kind
        return other

    def _outputs(self, call: Call, first: str, absent: tuple[str, ...] = ()) -> Outputs | str:
        """What is returned in its place, with this as its first item; or why nothing can be. What else it returns may
        be used by modules that are ``absent`` as well."""
        items: list[str | None] = []
        for place, output in enumerate(call.outputs):
            if output.argument is not None and place:
                items.append(output.argument)
            elif place == 0:
                items.append(first)
            elif output.operation is not None and self._is_read_after(output.operation, call, absent):
                return f"{call.module} returns more than is added to the stream, and it is used"
            else:
                items.append(None)
        if not items:
            return f"{call.module} returns nothing"
        return Outputs(tuple(items), call.returns_tuple)

    def _used_outside(self, names: tuple[str, ...]) -> str | None:
        """Whether what is computed in these modules is used elsewhere, other than as what they return (keys and values
        of a layer that later ones attend to)."""
        for name in names:
            for call in self.calls_of[name]:
                returned = {output.operation for output in call.outputs}
                for n in range(call.first, call.last):
                    if n not in returned and self._is_read_after(n, call, names):
                        return f"what {name} computes is used outside of it"
        return None

    def _is_read_after(self, operation: int, call: Call, absent: tuple[str, ...]) -> bool:
        for reader in self.readers.get(operation, ()):
            calls = self.recording.within(self.recording.operations[reader].call)
            if reader >= call.last and not any(self.recording.calls[n].module in absent for n in calls):
                return True
        return False

    def _try(self, layer: str, call: Call, absent: dict[str, Outputs]) -> str | None:
        """What happens when a layer is called without them; None when it returns what it did."""
        module = self.modules[layer]
        what = tuple((name.removeprefix(layer), outputs) for name, outputs in absent.items())
        key = (likeness(module), what)
        if key not in self.tried:
            problem = self._call_without(module, call, absent)
            if problem is None and not self._trains_without(module, call, {}):  # else it does not, whatever is absent
                problem = self._trains_without(module, call, absent)
            self.tried[key] = problem
        return self.tried[key]

    def _trains_without(self, module: nn.Module, call: Call, absent: dict[str, Outputs]) -> str | None:
        """As :meth:`_call_without`, in training mode: what drops whole samples asks for their number."""
        module.train()
        try:
            return self._call_without(module, call, absent)
        finally:
            module.eval()

    def _call_without(self, module: nn.Module, call: Call, absent: dict[str, Outputs]) -> str | None:
        args, kwargs = tree_map(lambda x: x, call.given)
        given = [t for t in tree_leaves(call.given) if hasattr(t, "shape")]
        expected = [t.shape for t in given[:1]]
        with contextlib.ExitStack() as stack:
            for name, outputs in absent.items():
                stack.enter_context(_in_place_of(self.modules[name], Absent(type(self.modules[name]), outputs)))
            try:
                result = call_again(module, args, kwargs)
            except Exception as error:  # whatever the host's code says to it
                return f"without {', '.join(absent)} {call.module} raises {type(error).__name__}: {error}"
        first = result[0] if isinstance(result, (tuple, list)) else result
        if first.shape != expected[0]:
            return f"without {', '.join(absent)} {call.module} returns {tuple(first.shape)}, not {tuple(expected[0])}"
        return None


@contextlib.contextmanager
def _in_place_of(module: nn.Module, absent: Absent) -> Iterator[None]:
    """The module has no parameters any more. Hooks of the recording do not run, either."""
    owners = [vars(owner)["_parameters"] for owner in module.modules()]
    parameters = [dict(own) for own in owners]
    vars(module)["forward"] = absent.forward
    for own in owners:
        own.update(dict.fromkeys(own))
    try:
        yield
    finally:
        del vars(module)["forward"]
        for own, before in zip(owners, parameters, strict=True):
            own.update(before)
