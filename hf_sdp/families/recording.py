"""What a model computes, recorded on the meta device: operations, each within the calls of modules.

A model of any size is recorded in about a second, without memory. Values do not exist there: where a model asks for one
(a mask without padding?), it is told 1 or True, as of a batch without padding.
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention import set_attention
from .inputs import LENGTH, example_inputs
from .values import KNOWN_SIZES, PythonOfValues, WithoutValues, without_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ATTENTION = "hf_sdp_recorded"


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        name: of the aten operator.
        inputs: numbers of the operations that made its inputs; those of parameters and of what was given are left out.
        parameters: names of those that it reads.
        call: number of the innermost call around it; -1 outside of all.
        is_scaling: whether all inputs but one are numbers or have one element.
        flops: multiplications and additions, of matrix products and convolutions.
        is_of_weights: whether an operand is a parameter, or computed from parameters alone.
    """

    name: str
    inputs: tuple[int, ...]
    parameters: tuple[str, ...]
    call: int
    is_scaling: bool
    flops: int
    is_of_weights: bool


@dataclass
class Call:
    """One call of a module. ``None`` in the place of an operation: not a tensor, or one that was not computed.

    Attributes:
        module: its name.
        outer: number of the call around it, or -1.
        arguments: name of each argument of its forward -> number of the operation that made it.
        given: the arguments themselves.
        outputs: the operation of each item of what is returned, and which argument it is, if it is one.
        returns_tuple: else one value is returned.
        shape: of the first tensor that is returned.
        first, last: its operations are numbered from ``first`` up to, but not with, ``last``.
    """

    module: str
    outer: int
    arguments: dict[str, int | None]
    given: tuple[tuple, dict[str, Any]]
    first: int
    last: int = -1
    outputs: list["Output"] = field(default_factory=list)
    shape: tuple[int, ...] | None = None
    returns_tuple: bool = False


@dataclass(frozen=True)
class Output:
    """One item of what a call returns; ``argument``: the name of the argument that it is."""

    operation: int | None
    argument: str | None


@dataclass
class Recording:
    """Operations and calls, each in the order in which they began; ``matrices``: parameters of two dims or more;
    ``attention``: for each attention the call in which it is, and its numbers of query and of key/value heads;
    ``replaced``: modules that the forward put others in the place of (BigBird's attention, for short sequences)."""

    operations: list[Operation] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    matrices: set[str] = field(default_factory=set)
    attention: list[tuple[int, int, int]] = field(default_factory=list)
    replaced: set[str] = field(default_factory=set)

    def forget_arguments(self, but: set[str]) -> None:
        """Let go of the arguments of all calls but those of these modules."""
        for call in self.calls:
            if call.module not in but:
                call.given = ((), {})

    def calls_of(self) -> dict[str, list[Call]]:
        """Module -> its calls."""
        result: dict[str, list[Call]] = {}
        for call in self.calls:
            result.setdefault(call.module, []).append(call)
        return result

    def within(self, call: int) -> Iterator[int]:
        """The calls around an operation whose innermost one is ``call``, from the inside."""
        while call >= 0:
            yield call
            call = self.calls[call].outer


def record(model: "PreTrainedModel", length: int = LENGTH) -> Recording:
    """A forward in eval mode, without cache and gradients, of sequences of ``length`` tokens.

    ``model``: on the meta device, for this alone: it is not to be used any more. Raises: whatever the model raises on
    the meta device, where it does not only compute.
    """
    _choose_implementations(model)
    model.eval()
    recorder = _Recorder(model)
    modules = dict(model.named_modules())
    handles = [handle for name, module in modules.items() for handle in recorder.watch(name, module)]
    arguments = example_inputs(model, length)
    with torch.no_grad(), KNOWN_SIZES(), PythonOfValues(), recorder:
        model(**arguments)
    for handle in handles:
        handle.remove()
    now = dict(model.named_modules())
    recorder.recording.replaced = {name for name, module in modules.items() if now.get(name) is not module}
    return recorder.recording


def call_again(module: nn.Module, args: tuple, kwargs: dict[str, Any]):
    """Call a module of a model that was recorded, without recording it."""
    with torch.no_grad(), KNOWN_SIZES(), PythonOfValues(), WithoutValues():
        return module(*args, **kwargs)


def _choose_implementations(model: "PreTrainedModel") -> None:
    """Attention without masks, and experts without loops over those that have tokens, where there is a choice."""
    with contextlib.suppress(ValueError, AttributeError, ImportError):
        set_attention(model, _ATTENTION)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config.use_cache = False
            if getattr(config, "_experts_implementation", None) is not None:
                config._experts_implementation = "batched_mm"


def _attention(module, query, key, value, attention_mask, *args, **kwargs):
    """Its two products, of all queries with all keys, and one operation that depends on all arguments."""
    recorder = _get_current_dispatch_mode()
    if isinstance(recorder, _Recorder):
        recorder.recording.attention.append((recorder.call, query.shape[1], key.shape[1]))
    batch, heads, length, _ = query.shape
    of_one_key = query.reshape(batch, key.shape[1], -1, query.shape[-1])
    output = of_one_key @ key.transpose(-1, -2) @ value
    output = output.reshape(batch, heads, length, value.shape[-1]).transpose(1, 2).contiguous()
    for tensor in tree_leaves((attention_mask, args, kwargs)):
        if isinstance(tensor, torch.Tensor):
            output = output + tensor.sum()
    return output, None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(_ATTENTION, eager_mask)  # some models read their masks themselves


class _Recorder(TorchDispatchMode):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.recording = Recording(matrices={name for name, p in model.named_parameters() if p.dim() > 1})
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.made_by: dict[int, int] = {}
        self.written_by: dict[int, int] = {}  # by storage
        self.kept: list[torch.Tensor] = []  # no two of them have one id
        self.weights = set(self.names)  # by id: parameters, and what is computed from them alone; no token
        self.call = -1

    def watch(self, name: str, module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
        signature = inspect.signature(type(module).forward)

        def before(module, args, kwargs):
            try:
                arguments = dict(signature.bind(module, *args, **kwargs).arguments)
            except TypeError:
                arguments = {}
            number = {key: self._operation(value) for key, value in list(arguments.items())[1:]}
            self.recording.calls.append(
                Call(name, self.call, number, (args, kwargs), first=len(self.recording.operations))
            )
            self.call = len(self.recording.calls) - 1

        def after(module, args, kwargs, output):
            call = self.recording.calls[self.call]
            call.last = len(self.recording.operations)
            call.returns_tuple = isinstance(output, (tuple, list))
            call.shape = next((tuple(t.shape) for t in tree_leaves(output) if isinstance(t, torch.Tensor)), None)
            arguments = signature.bind(module, *args, **kwargs).arguments if args or kwargs else {}
            for item in output if call.returns_tuple else (output,):
                of_argument = next((n for n, v in arguments.items() if v is item and item is not None), None)
                call.outputs.append(Output(self._operation(item), of_argument))
            self.call = call.outer

        return (
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after, with_kwargs=True),
        )

    def _operation(self, value) -> int | None:
        if not isinstance(value, torch.Tensor):
            return None
        made = self.made_by.get(id(value), -1)
        written = self.written_by.get(_storage(value), -1)
        return max(made, written) if max(made, written) >= 0 else None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        inputs = tuple(dict.fromkeys(n for t in read if (n := self._operation(t)) is not None))
        parameters = tuple(self.names[id(t)] for t in read if id(t) in self.names)
        result = without_values(func, args, kwargs)
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor)
        ]
        number = len(self.recording.operations)
        is_scaling = sum(t.numel() > 1 for t in read) == 1
        name = func._schema.name.removeprefix("aten::")
        formula = flop_registry.get(func.overloadpacket)
        flops = 0 if formula is None else formula(*args, **kwargs, out_val=result)
        of_weights = [id(t) in self.weights for t in read if t.is_floating_point()]
        self.recording.operations.append(
            Operation(name, inputs, parameters, self.call, is_scaling, flops, any(of_weights))
        )
        for tensor in (*tree_leaves(result), *written):
            if isinstance(tensor, torch.Tensor):
                if of_weights and all(of_weights) and name != "embedding":
                    self.weights.add(id(tensor))
                self.made_by[id(tensor)] = number
                self.kept.append(tensor)
        for tensor in written:
            self.written_by[_storage(tensor)] = number
        return result


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
