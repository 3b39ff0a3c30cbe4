"""A layer run on the processor without its matrices: the outputs of its linear layers are given."""

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from .absent import Absent
from .arguments import by_name, of_held_heads
from .base import OfHeads, Ranges
from .layers import STATISTICS, has_statistics, is_linear, narrowed

_LARGEST = 2**24  # elements of a parameter or buffer that is given values


class _Done(Exception):
    """The rows have their inputs; the rest of the layer is not needed."""


@dataclass(frozen=True)
class Narrow:
    """What of a layer is narrower where some units are held. Names are relative to the layer.

    Attributes:
        num_units, units: how many there are, and which of them are held.
        vectors: parameter -> the dim that is cut.
        sizes, arguments: as those of ``base.Cut``.
    """

    num_units: int = 1
    units: Sequence[int] = (0,)
    vectors: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    arguments: dict[str, OfHeads] = field(default_factory=dict)


class TrialRun:
    """A layer with random values for all that is small, without matrices.

    Args:
        layer: on the meta device. It is copied.
        name: its name. linears: names of those of its linear layers whose outputs will be given.
        rows: those of them whose inputs are wanted.
        arguments: of a call of the layer, on the meta device.
        others: what stands in for other modules of the layer.
    """

    def __init__(
        self,
        layer: nn.Module,
        name: str,
        linears: Iterable[str],
        rows: list[str],
        arguments: tuple[tuple, dict[str, Any]],
        others: dict[str, Absent],
    ) -> None:
        self.name, self.linears, self.rows = name, list(linears), rows
        self.layer = _with_values(layer)
        for other, absent in others.items():
            vars(self.layer.get_submodule(self.own(other)))["forward"] = absent.forward
        generator = torch.Generator().manual_seed(0)
        self.arguments = tree_map(lambda value: _values(value, generator), arguments)
        self.signatures = {
            own: inspect.signature(type(module).forward) for own, module in self.layer.named_modules() if own
        }

    def own(self, name: str) -> str:
        """A full name, relative to the layer."""
        return name.removeprefix(self.name).removeprefix(".")

    def inputs_of_rows(self, outputs: dict[str, torch.Tensor], narrow: Narrow) -> dict[str, torch.Tensor]:
        """Run the layer with these outputs of its linear layers, until its rows have their inputs."""
        found: dict[str, torch.Tensor] = {}
        with contextlib.ExitStack() as stack:
            for name in self.linears:
                forward = self._forward_of(name, outputs[name], found)
                stack.enter_context(_attribute(self.layer.get_submodule(self.own(name)), "forward", forward))
            for name, dim in narrow.vectors.items():
                owner, _, last = name.rpartition(".")
                module = self.layer.get_submodule(owner)
                p = module.get_parameter(last)
                index = torch.tensor(indices(((0, p.shape[dim]),), narrow.num_units, narrow.units))
                stack.enter_context(_item(module._parameters, last, p.index_select(dim, index)))
                for statistics in STATISTICS if last == "weight" and has_statistics(module) else ():
                    stack.enter_context(_item(module._buffers, statistics, module.get_buffer(statistics)[index]))
            for name, attributes in narrow.sizes.items():
                share = len(narrow.units) / narrow.num_units
                for attribute, value in narrowed(self.layer.get_submodule(name), attributes, share).items():
                    stack.enter_context(_attribute(self.layer.get_submodule(name), attribute, value))
            for name in narrow.arguments:
                hook = functools.partial(self._cut_arguments, name, narrow)
                stack.enter_context(self._hook(name, hook))
            args, kwargs = self.arguments
            with torch.no_grad(), contextlib.suppress(_Done):
                self.layer(*args, **kwargs)
        missing = [name for name in self.rows if name not in found]
        if missing:
            raise RuntimeError(f"{missing[0]} is not called")
        return found

    def arguments_with(self, outputs: dict[str, torch.Tensor], heads: int) -> list[tuple[str, str, int]]:
        """The arguments of modules that have something for each of so many heads: module, argument and dim."""
        found: dict[tuple[str, str, int], None] = {}

        def look(name: str, module: nn.Module, args, kwargs) -> None:
            for argument, value in by_name(self.signatures[name], (args, kwargs)).items():
                if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 2:
                    dims = [dim for dim, size in enumerate(value.shape[:2]) if size % heads == 0]
                    found.update(dict.fromkeys((name, argument, dim) for dim in dims))

        with contextlib.ExitStack() as stack:
            for name in self.signatures:
                stack.enter_context(self._hook(name, functools.partial(look, name)))
            self.inputs_of_rows(outputs, Narrow())
        return list(found)

    def _hook(self, name: str, hook) -> RemovableHandle:
        return self.layer.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)

    def _cut_arguments(self, name: str, narrow: Narrow, module: nn.Module, args, kwargs):
        given, _ = of_held_heads(
            self.signatures[name], (args, kwargs), narrow.arguments[name], narrow.num_units, narrow.units
        )
        return given

    def _forward_of(self, name: str, output: torch.Tensor, found: dict[str, torch.Tensor]):
        def forward(x, *args, **kwargs):
            if name in self.rows:
                found[name] = x
                if len(found) == len(self.rows):
                    raise _Done
            return output

        return forward


def _with_values(layer: nn.Module) -> nn.Module:
    layer = copy.deepcopy(layer).eval()
    generator = torch.Generator().manual_seed(1)
    for module in layer.modules():
        for values in (module._parameters, module._buffers):
            for own, tensor in values.items():
                if tensor is not None and not is_linear(module) and tensor.numel() <= _LARGEST:
                    new = _values(tensor, generator)
                    new = new.abs() if own == "running_var" else new
                    values[own] = nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new
        config = vars(module).get("config")
        if config is not None and hasattr(config, "_attn_implementation"):
            config._attn_implementation = "eager"
    return layer


def indices(ranges: Ranges, units: int, some: Sequence[int]) -> list[int]:
    return [
        index
        for start, stop in ranges
        for unit in some
        for index in range(start + (stop - start) * unit // units, start + (stop - start) * (unit + 1) // units)
    ]


def _values(value: Any, generator: torch.Generator) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=generator)
    return (
        torch.ones(value.shape, dtype=value.dtype)
        if value.dtype is torch.bool
        else torch.zeros_like(value, device="cpu")
    )


@contextlib.contextmanager
def _attribute(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    with _item(vars(module), name, value):
        yield


@contextlib.contextmanager
def _item(values: dict, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = values.get(name, missing)
    values[name] = value
    try:
        yield
    finally:
        if before is missing:
            del values[name]
        else:
            values[name] = before
