"""How the inner width of a block can be cut, found by trying.

A block computes ``rows(f(columns(x)))``: column-wise linear layers, something in between, and row-wise linear layers.
A cut is right when f, given what some units have of the columns' outputs, returns what these units have of the rows'
inputs. This is tried on the processor, with random numbers in the place of the outputs of all linear layers: no weight
is needed, and a layer of any width takes milliseconds. What is tried: fused projections as ranges, in either order;
numbers of heads and widths that a module keeps as attributes, or reads from its config; parameters with an element for
each head.
"""

import contextlib
import copy
import functools
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from .absent import Absent
from .base import Block
from .kinds import ATTENTION, CROSS_ATTENTION, EXPERTS, KINDS, MIXER, MLP
from .narrow_config import NarrowConfig
from .recording import Recording

LINEAR = (nn.Linear, Conv1D)
T = TypeVar("T")
Ranges = tuple[tuple[int, int], ...]
_LARGEST = 2**24  # elements of a parameter or buffer that is given values
_HEADS = re.compile(r"heads?$|n_heads?|num_.*heads|num_key_value$")
_WIDTHS = re.compile(r"dim|size|width|inner")


@dataclass(frozen=True)
class Cut:
    """How a block is cut. Names are full names.

    Attributes:
        kind, name: of what is cut: the block itself, or one of the modules in it.
        units: into how many equal parts at most: heads with their keys and values, neurons, or experts.
        dims: parameter -> the dim that is cut.
        packed: parameter -> ranges along it, each of which is cut, where it is not one.
        sizes: module -> its attributes that are proportional to what is held; ``config.x`` is one of its config's.
    """

    kind: str
    name: str
    units: int
    dims: dict[str, int]
    packed: dict[str, Ranges] = field(default_factory=dict)
    sizes: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def renamed(self, old: str, new: str) -> "Cut":
        """The same of another layer."""

        def of_new(values: dict[str, T]) -> dict[str, T]:
            return {new + name.removeprefix(old): value for name, value in values.items()}

        name = new + self.name.removeprefix(old)
        return Cut(self.kind, name, self.units, of_new(self.dims), of_new(self.packed), of_new(self.sizes))


class CannotCut(Exception):
    """Why a block is held as a whole."""


def find_cuts(
    model: nn.Module, recording: Recording, layer: str, block: Block, others: dict[str, Absent]
) -> tuple[Cut, ...]:
    """How a block is cut: as one, or experts and what is beside them.

    Args:
        model: on the meta device, as it was recorded.
        layer: name of the block's layer.
        others: what stands in for the modules of the layer's other blocks, where they can be left out.
    Raises: CannotCut.
    """
    if KINDS[block.kind] is not EXPERTS:
        return (_Trial(model, recording, layer, block, others).find(),)
    experts = [
        f"{member}.{name}" if name else member
        for member in block.modules
        for name, module in model.get_submodule(member).named_modules()
        if is_experts(module)
    ]
    if not experts:
        raise CannotCut(f"{block.main} has no experts in parameters of three dims")
    found = [_cut_of_experts(name, model.get_submodule(name)) for name in experts]
    for member in block.modules:
        for name, _ in model.get_submodule(member).named_children():
            if re.search("shared", name):
                shared = f"{member}.{name}"
                with contextlib.suppress(CannotCut):  # then all hold them
                    beside = Block(MLP.name, block.layer, (shared,), shared)
                    found.append(_Trial(model, recording, layer, beside, others).find())
    return tuple(found)


def is_experts(module: nn.Module) -> bool:
    """Whether a module has its experts in parameters with one row for each, and knows of expert parallelism."""
    number = vars(module).get("num_experts", 0)
    own = [p for p in module._parameters.values() if p is not None]
    return (
        "_is_expert_parallel" in vars(module)
        and number > 1
        and any(p.dim() == 3 for p in own)
        and all(p.shape[0] == number for p in own)
    )


def _cut_of_experts(name: str, experts: nn.Module) -> Cut:
    dims = {f"{name}.{p}": 0 for p in experts._parameters if experts._parameters[p] is not None}
    number = vars(experts)["num_experts"]
    return Cut(EXPERTS.name, name, number, dims, {}, {name: ("num_experts",)})


@functools.cache
def _is_linear(cls: type) -> bool:
    if not issubclass(cls, nn.Linear) or not cls.__module__.startswith("transformers."):
        return cls in LINEAR
    linear = nn.Linear(3, 2)
    x = torch.randn(4, 3)
    expected = linear(x)
    linear.__class__ = cls
    try:
        return torch.allclose(linear(x), expected)
    except Exception:  # it needs more than a linear layer has
        return False


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies with its matrix, and does nothing else. Of subclasses, only those of transformers."""
    return _is_linear(type(module))  # type: ignore[arg-type]


class _Done(Exception):
    """The rows have their inputs; the rest of the layer is not needed."""


class _Trial:
    def __init__(
        self, model: nn.Module, recording: Recording, layer: str, block: Block, others: dict[str, Absent]
    ) -> None:
        if KINDS[block.kind] in (EXPERTS, MIXER):
            raise CannotCut(f"{block.main} ({block.kind}) is not known how to be cut")
        self.block, self.layer_name = block, layer
        self.recording = recording
        self.number = next(n for n, call in enumerate(recording.calls) if call.module == layer)
        self.linears = self._linears(model.get_submodule(layer))
        self.columns, self.rows = self._columns_and_rows()
        self.layer = self._with_values(model.get_submodule(layer))
        for name, absent in others.items():
            vars(self.layer.get_submodule(self._own(name)))["forward"] = absent.forward
        torch_state = torch.Generator().manual_seed(0)
        self.arguments = tree_map(lambda v: _values(v, torch_state), recording.calls[self.number].given)
        self.heads = self._heads()

    def _own(self, name: str) -> str:
        return name.removeprefix(self.layer_name).removeprefix(".")

    def _linears(self, layer: nn.Module) -> dict[str, nn.Module]:
        """Of the block, by full name, in forward order of its modules."""
        found = {}
        for member in self.block.modules:
            for name, module in layer.get_submodule(self._own(member)).named_modules():
                if is_linear(module):
                    found[f"{member}.{name}" if name else member] = module
        return found

    def _columns_and_rows(self) -> tuple[list[str], list[str]]:
        """Rows: linear layers whose output no other one of the block is computed from. Columns: those before them."""
        recording, call = self.recording, self.recording.calls[self.number]
        made_by: dict[int, str] = {}
        arguments: dict[str, list[int]] = {}
        for n in range(self.number + 1, len(recording.calls)):
            inner = recording.calls[n]
            if inner.first >= call.last:
                break
            if inner.module in self.linears and inner.outputs and inner.outputs[0].operation is not None:
                made_by[inner.outputs[0].operation] = inner.module
                given = [i for i in inner.arguments.values() if i is not None]
                arguments.setdefault(inner.module, []).extend(given)
        nearest: dict[int, frozenset[str]] = {}
        for n in range(call.first, call.last):
            before = _union(nearest.get(i) for i in recording.operations[n].inputs)
            nearest[n] = frozenset({made_by[n]}) if n in made_by else before
        feeds = {name: _union(nearest.get(i) for i in given) for name, given in arguments.items()}
        fed = _union(feeds.values())
        rows = [name for name in self.linears if feeds.get(name) and name not in fed]
        before_rows = _union(feeds[name] for name in rows)
        columns = [name for name in self.linears if name in before_rows]
        if not rows or not columns:
            raise CannotCut(f"{self.block.main} has no linear layer after another one")
        return columns, rows

    def _with_values(self, layer: nn.Module) -> nn.Module:
        layer = copy.deepcopy(layer).eval()
        generator = torch.Generator().manual_seed(1)
        for module in layer.modules():
            for values in (module._parameters, module._buffers):
                for own, tensor in values.items():
                    if tensor is not None and not is_linear(module) and tensor.numel() <= _LARGEST:
                        new = _values(tensor, generator)
                        values[own] = nn.Parameter(new, False) if isinstance(tensor, nn.Parameter) else new
            config = vars(module).get("config")
            if config is not None and hasattr(config, "_attn_implementation"):
                config._attn_implementation = "eager"
        return layer

    def _heads(self) -> tuple[int, int]:
        """Query heads, and key/value heads."""
        for n, query, key in self.recording.attention:
            within = {self.recording.calls[outer].module for outer in self.recording.within(n)}
            if self.layer_name in within and within & set(self.block.modules):
                return query, key
        found = {
            value
            for name in self._containers()
            for attribute, value in vars(self.layer.get_submodule(name)).items()
            if isinstance(value, int) and not isinstance(value, bool) and _HEADS.search(attribute)
        }
        return (max(found), min(found)) if found else (1, 1)

    def _containers(self) -> list[str]:
        """Modules of the block, relative to the layer, and those around them, without the linear layers."""
        names: dict[str, None] = {}
        for member in self.block.modules:
            own = self._own(member)
            parts = own.split(".")
            names.update(dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts))))
            names.update(
                dict.fromkeys(f"{own}.{n}" if n else own for n, _ in self.layer.get_submodule(own).named_modules())
            )
        return [n for n in names if not is_linear(self.layer.get_submodule(n))]

    def find(self) -> Cut:
        width = {_in_features(self.linears[name]) for name in self.rows}
        if len(width) > 1:
            raise CannotCut(f"{self.block.main}: its row-wise layers have inputs of widths {sorted(width)}")
        inner = width.pop()
        attends = KINDS[self.block.kind] in (ATTENTION, CROSS_ATTENTION)
        units = self.heads[1] if attends else inner
        if attends and units == 1:  # all query heads need the one of keys and values: only they are cut
            units = self.heads[0]
            self.columns = [name for name in self.columns if _out_features(self.linears[name]) >= inner]
        if units < 2 or not self.columns:
            raise CannotCut(f"{self.block.main} has {units} head")
        if inner % units:
            raise CannotCut(f"{self.block.main}: {units} units do not divide its inner width of {inner}")
        generator = torch.Generator().manual_seed(2)
        outputs = {name: self._random_output(name, generator) for name in self.linears}
        problem = None
        try:
            expected = self._inputs_of_rows({name: outputs[name] for name in self.linears}, {}, {})
        except Exception as error:  # whatever the host's code says
            raise CannotCut(f"{self.block.main} cannot be tried: {type(error).__name__}: {error}") from error
        chosen = [tuple(range(units // 2)), (units - 1,), (0,)]
        for packed, vectors, sizes in self._candidates(inner, units, attends):
            for some in chosen:
                problem = self._compare(outputs, expected, units, some, packed, vectors, sizes)
                if problem:
                    break
            else:
                return self._cut(units, packed, vectors, sizes)
        raise CannotCut(
            f"{self.block.main}: what its heads or neurons compute is not apart from each other ({problem})"
        )

    def _random_output(self, name: str, generator: torch.Generator) -> torch.Tensor:
        shape = next((call.shape for call in self.recording.calls if call.module == name), None)
        return torch.randn(shape or (), generator=generator)

    def _candidates(self, inner: int, units: int, attends: bool) -> Iterator[tuple[dict, dict, dict]]:
        layouts = []
        for name in self.columns:
            width = _out_features(self.linears[name])
            of_one: list[Ranges] = [((0, width),)] if width % units == 0 else []
            if attends and width != inner:
                heads, groups = self.heads
                size = width // (heads + 2 * groups)
                if size * (heads + 2 * groups) == width:
                    ends = (0, heads * size, (heads + groups) * size, width)
                    of_one.append(tuple(itertools.pairwise(ends)))
            for number in (2, 3, 4):
                if width != inner and width % (number * units) == 0:
                    of_one.append(tuple(itertools.pairwise(range(0, width + 1, width // number))))
            if not of_one:
                raise CannotCut(f"{name}: its {width} outputs cannot be cut into {units} units")
            layouts.append(list(dict.fromkeys(of_one)))
        for layout in itertools.islice(itertools.product(*layouts), 16):
            packed = dict(zip(self.columns, layout, strict=True))
            for vectors in self._vectors(units, attends):
                for sizes in self._sizes(inner, units):
                    yield packed, vectors, sizes

    def _vectors(self, units: int, attends: bool) -> list[dict[str, int]]:
        """Parameters with an element for each head (or neuron): name relative to the layer -> dim."""
        sizes = {*self.heads} if attends else {units}
        found = {}
        for container in self._containers():
            for name, p in self.layer.get_submodule(container).named_parameters(recurse=False):
                dims = [dim for dim, size in enumerate(p.shape) if size in sizes and size > 1]
                if len(dims) == 1 and p.numel() == p.shape[dims[0]]:
                    found[f"{container}.{name}" if container else name] = dims[0]
        return [{}, found] if found else [{}]

    def _sizes(self, inner: int, units: int) -> Iterator[dict[str, tuple[str, ...]]]:
        heads, widths, of_config = {}, {}, {}
        outputs = {_out_features(self.linears[name]) for name in self.columns}
        for container in self._containers():
            module = self.layer.get_submodule(container)
            own = {a: v for a, v in vars(module).items() if isinstance(v, int) and not isinstance(v, bool)}
            by_head = tuple(a for a, v in own.items() if v in self.heads and v > 1 and self._counts_heads(a))
            by_width = tuple(a for a, v in own.items() if v in {inner, *outputs} and _WIDTHS.search(a))
            config = vars(module).get("config")
            known = {} if config is None else config.to_dict()
            by_config = tuple(
                f"config.{a}"
                for a, v in known.items()
                if isinstance(v, int) and v in self.heads and v > 1 and self._counts_heads(a)
            )
            heads[container], widths[container], of_config[container] = by_head, by_width, by_config
        seen = set()
        for which in ((), (heads,), (heads, widths), (widths,), (heads, of_config), (heads, widths, of_config)):
            sizes = {c: tuple(a for kind in which for a in kind[c]) for c in heads}
            sizes = {c: attributes for c, attributes in sizes.items() if attributes}
            if (key := tuple(sorted(sizes.items()))) not in seen:
                seen.add(key)
                yield sizes

    def _counts_heads(self, attribute: str) -> bool:
        """Also groups, where all query heads are in the one of a single key/value head."""
        return bool(_HEADS.search(attribute)) or (self.heads[1] == 1 and attribute.endswith("groups"))

    def _compare(self, outputs, expected, units: int, some: tuple[int, ...], packed, vectors, sizes) -> str | None:
        """What is wrong when only some units are held; None if nothing is."""
        held = dict(outputs)
        for name, ranges in packed.items():
            held[name] = outputs[name][..., _indices(ranges, units, some)]
        try:
            found = self._inputs_of_rows(
                held, {n: (dim, units, some) for n, dim in vectors.items()}, sizes, len(some) / units
            )
        except Exception as error:  # whatever the host's code says
            return f"{type(error).__name__}: {error}"
        for name, full in expected.items():
            part = full[..., _indices(((0, full.shape[-1]),), units, some)]
            if found[name].shape != part.shape:
                return f"the input of {name} has shape {tuple(found[name].shape)}, not {tuple(part.shape)}"
            if not torch.allclose(found[name], part, rtol=1e-4, atol=1e-5):
                return f"the input of {name} differs"
        return None

    def _inputs_of_rows(self, outputs, vectors, sizes, share: float = 1.0) -> dict[str, torch.Tensor]:
        """Run the layer with these outputs of its linear layers, until its rows have their inputs."""
        found: dict[str, torch.Tensor] = {}
        with contextlib.ExitStack() as stack:
            for name in self.linears:
                forward = self._forward_of(name, outputs[name], found)
                stack.enter_context(_attribute(self.layer.get_submodule(self._own(name)), "forward", forward))
            for name, (dim, units, some) in vectors.items():
                owner, _, last = name.rpartition(".")
                module = self.layer.get_submodule(owner)
                p = module.get_parameter(last)
                index = torch.tensor(_indices(((0, p.shape[dim]),), units, some))
                stack.enter_context(_item(module._parameters, last, p.index_select(dim, index)))
            for name, attributes in sizes.items():
                for attribute, value in narrowed(self.layer.get_submodule(name), attributes, share).items():
                    stack.enter_context(_attribute(self.layer.get_submodule(name), attribute, value))
            args, kwargs = self.arguments
            with torch.no_grad(), contextlib.suppress(_Done):
                self.layer(*args, **kwargs)
        missing = [name for name in self.rows if name not in found]
        if missing:
            raise RuntimeError(f"{missing[0]} is not called")
        return found

    def _forward_of(self, name: str, output: torch.Tensor, found: dict[str, torch.Tensor]):
        def forward(x, *args, **kwargs):
            if name in self.rows:
                found[name] = x
                if len(found) == len(self.rows):
                    raise _Done
            return output

        return forward

    def _cut(self, units: int, packed: dict[str, Ranges], vectors: dict[str, int], sizes: dict) -> Cut:
        prefix = self.layer_name + "."
        dims: dict[str, int] = {}
        for name, linear in self.linears.items():
            transposed = isinstance(linear, Conv1D)
            if name in self.columns:
                dims[f"{name}.weight"] = 1 if transposed else 0
                if linear.bias is not None:
                    dims[f"{name}.bias"] = 0
            elif name in self.rows:
                dims[f"{name}.weight"] = 0 if transposed else 1
        dims |= {prefix + name: dim for name, dim in vectors.items()}
        fused = {
            f"{name}.{last}": ranges
            for name, ranges in packed.items()
            for last in ("weight", "bias")
            if len(ranges) > 1 and f"{name}.{last}" in dims
        }
        of_modules = {prefix + name: attributes for name, attributes in sizes.items()}
        return Cut(self.block.kind, self.block.main, units, dims, fused, of_modules)


def narrowed(module: nn.Module, attributes: tuple[str, ...], share: float) -> dict[str, Any]:
    """Values of these attributes of a module where a share of its units is held."""
    result = {a: round(vars(module)[a] * share) for a in attributes if not a.startswith("config.")}
    of_config = [a.removeprefix("config.") for a in attributes if a.startswith("config.")]
    if of_config:
        config = module.config
        result["config"] = NarrowConfig(config, {a: round(getattr(config, a) * share) for a in of_config})
    return result


def _union(sets: Iterable[frozenset[str] | None]) -> frozenset[str]:
    return frozenset(name for some in sets if some for name in some)


def _indices(ranges: Ranges, units: int, some: tuple[int, ...]) -> list[int]:
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


def _in_features(linear: Any) -> int:
    return linear.nx if isinstance(linear, Conv1D) else linear.in_features


def _out_features(linear: Any) -> int:
    return linear.nf if isinstance(linear, Conv1D) else linear.out_features


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
