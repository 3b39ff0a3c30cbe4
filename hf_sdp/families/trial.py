"""How the inner width of a block can be cut, found by trying.

A block computes ``rows(f(columns(x)))``: column-wise linear layers, something in between, and row-wise linear layers.
A cut is right when f, given what some units have of the columns' outputs, returns what these units have of the rows'
inputs. This is tried on the processor, with random numbers in the place of the outputs of all linear layers: no weight
is needed, and a layer of any width takes milliseconds. What is tried: fused projections as ranges, in either order;
numbers of heads and widths that a module keeps as attributes, or reads from its config; parameters with an element for
each head or channel (of a norm, of a convolution of channels or groups) that lie between columns and rows.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .absent import Absent
from .base import Block, CannotCut, Cut, OfHeads, Ranges
from .columns import columns_and_rows, read_between, refuse_what_is_read_elsewhere
from .kinds import ATTENTION, CROSS_ATTENTION, EXPERTS, KINDS, MIXER
from .layers import channel_dim, in_features, is_grouped, is_linear, out_features
from .recording import Recording
from .trial_run import Narrow, TrialRun, indices

_HEADS = re.compile(r"heads?$|(?<![a-z])n_heads?|num_.*heads|num_key_value$")
_WIDTHS = re.compile(r"dim|size|width|inner")
_CHANNELS = ("in_channels", "out_channels", "groups")


class Trial:
    """Of one block; arguments as those of ``cuts.find_cuts``. Raises: CannotCut."""

    def __init__(
        self, model: nn.Module, recording: Recording, layer: str, block: Block, others: dict[str, Absent]
    ) -> None:
        if KINDS[block.kind] in (EXPERTS, MIXER):
            raise CannotCut(f"{block.main} ({block.kind}) is not known how to be cut")
        for member in block.modules:
            for replaced in recording.replaced:  # it would be of the full width again
                if f"{replaced}.".startswith(f"{member}.") or member.startswith(f"{replaced}."):
                    raise CannotCut(f"the model's forward puts another module in the place of {replaced}")
        self.block, self.layer_name = block, layer
        self.recording = recording
        self.number = next(n for n, call in enumerate(recording.calls) if call.module == layer)
        self.linears = self._linears(model.get_submodule(layer))
        self.columns, self.rows = columns_and_rows(recording, self.number, list(self.linears))
        if not self.columns:
            raise CannotCut(f"{block.main} has no linear layer after another one")
        self.between = read_between(recording, self.number, self.columns, self.rows)
        given = recording.calls[self.number].given
        self.run = TrialRun(model.get_submodule(layer), layer, self.linears, self.rows, given, others)
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

    def _heads(self) -> tuple[int, int]:
        """Query heads, and key/value heads."""
        for n, query, key in self.recording.attention:
            within = {self.recording.calls[outer].module for outer in self.recording.within(n)}
            if self.layer_name in within and within & set(self.block.modules):
                return query, key
        found = {
            value
            for name in self._containers()
            for attribute, value in vars(self.run.layer.get_submodule(name)).items()
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
                dict.fromkeys(f"{own}.{n}" if n else own for n, _ in self.run.layer.get_submodule(own).named_modules())
            )
        return [n for n in names if not is_linear(self.run.layer.get_submodule(n))]

    def find(self) -> Cut:
        """Raises: CannotCut, with what was wrong with the last cut that was tried."""
        width = {in_features(self.linears[name]) for name in self.rows}
        if len(width) > 1:
            raise CannotCut(f"{self.block.main}: its row-wise layers have inputs of widths {sorted(width)}")
        inner = width.pop()
        attends = KINDS[self.block.kind] in (ATTENTION, CROSS_ATTENTION)
        units = self.heads[1] if attends else math.gcd(inner, *self._groups())
        if attends and units == 1:  # all query heads need the one of keys and values: only they are cut
            units = self.heads[0]
            self.columns = [name for name in self.columns if out_features(self.linears[name]) >= inner]
        if units < 2 or not self.columns:
            raise CannotCut(f"{self.block.main} has {units} {'head' if attends else 'neuron or group'}")
        if inner % units:
            raise CannotCut(f"{self.block.main}: {units} units do not divide its inner width of {inner}")
        generator = torch.Generator().manual_seed(2)
        outputs = {name: self._random_output(name, generator) for name in self.linears}
        problem = None
        try:
            expected = self.run.inputs_of_rows(outputs, Narrow())
            given = self.run.arguments_with(outputs, self.heads[0]) if attends and self.heads[0] > 1 else []
        except Exception as error:  # whatever the host's code says
            raise CannotCut(f"{self.block.main} cannot be tried: {type(error).__name__}: {error}") from error
        chosen = [tuple(range(units // 2)), (units - 1,), (0,)]
        for packed, narrow in self._candidates(inner, units, attends, given):
            for some in chosen:
                problem = self._compare(outputs, expected, packed, dataclasses.replace(narrow, units=some))
                if problem:
                    break
            else:
                return self._cut(packed, narrow)
        raise CannotCut(
            f"{self.block.main}: what its heads or neurons compute is not apart from each other ({problem})"
        )

    def _random_output(self, name: str, generator: torch.Generator) -> torch.Tensor:
        shape = next((call.shape for call in self.recording.calls if call.module == name), None)
        return torch.randn(shape or (), generator=generator)

    def _candidates(
        self, inner: int, units: int, attends: bool, given: list[tuple[str, str, int]]
    ) -> Iterator[tuple[dict[str, Ranges], Narrow]]:
        layouts = []
        for name in self.columns:
            width = out_features(self.linears[name])
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
        of_heads: list[dict[str, OfHeads]] = [{module: {name: (dim, self.heads[0])}} for module, name, dim in given]
        for layout in itertools.islice(itertools.product(*layouts), 16):
            packed = dict(zip(self.columns, layout, strict=True))
            for arguments in ({}, *of_heads):
                for vectors in self._vectors({*self.heads} if attends else {units, inner}):
                    for sizes in self._sizes(inner, units):
                        yield packed, Narrow(units, (), vectors, sizes, arguments)

    def _groups(self) -> list[int]:
        """Of the convolutions between columns and rows that have several."""
        modules: list[Any] = [
            self.run.layer.get_submodule(name) for name in self._containers() if self._is_between(name)
        ]
        return [module.groups for module in modules if is_grouped(module)]

    def _is_between(self, container: str) -> bool:
        return f"{self.layer_name}.{container}.weight" in self.between

    def _vectors(self, sizes: set[int]) -> list[dict[str, int]]:
        """Parameters with something for each head (or neuron): name relative to the layer -> dim."""
        first, last = {}, {}
        for container in self._containers():
            for name, p in self.run.layer.get_submodule(container).named_parameters(recurse=False):
                dims = [dim for dim, size in enumerate(p.shape) if size in sizes and size > 1]
                own = f"{container}.{name}" if container else name
                if dims and f"{self.layer_name}.{own}" in self.between:
                    first[own], last[own] = dims[0], dims[-1]
        return [found for n, found in enumerate(({}, last, first)) if found not in ({}, last, first)[:n]]

    def _sizes(self, inner: int, units: int) -> Iterator[dict[str, tuple[str, ...]]]:
        heads, widths, of_config = {}, {}, {}
        outputs = {out_features(self.linears[name]) for name in self.columns} - {*self.heads}
        for container in self._containers():
            module = self.run.layer.get_submodule(container)
            own = {a: v for a, v in vars(module).items() if isinstance(v, int) and not isinstance(v, bool)}
            by_head = tuple(a for a, v in own.items() if v in self.heads and v > 1 and self._counts_heads(a))
            by_width = tuple(a for a, v in own.items() if v in {inner, *outputs} and _WIDTHS.search(a))
            if is_grouped(module) and self._is_between(container):
                by_width = _CHANNELS
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

    def _compare(self, outputs, expected, packed: dict[str, Ranges], narrow: Narrow) -> str | None:
        """What is wrong when only some units are held; None if nothing is."""
        units, some = narrow.num_units, narrow.units
        held = dict(outputs)
        for name, ranges in packed.items():
            held[name] = _chosen(outputs[name], self.linears[name], indices(ranges, units, some))
        try:
            found = self.run.inputs_of_rows(held, narrow)
        except Exception as error:  # whatever the host's code says
            return f"{type(error).__name__}: {error}"
        for name, full in expected.items():
            row = self.linears[name]
            part = _chosen(full, row, indices(((0, full.shape[channel_dim(row)]),), units, some))
            if found[name].shape != part.shape:
                return f"the input of {name} has shape {tuple(found[name].shape)}, not {tuple(part.shape)}"
            if not torch.allclose(found[name], part, rtol=1e-4, atol=1e-5):
                return f"the input of {name} differs"
        return None

    def _cut(self, packed: dict[str, Ranges], narrow: Narrow) -> Cut:
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
        dims |= {prefix + name: dim for name, dim in narrow.vectors.items()}
        refuse_what_is_read_elsewhere(self.recording, dims)
        fused = {
            f"{name}.{last}": ranges
            for name, ranges in packed.items()
            for last in ("weight", "bias")
            if len(ranges) > 1 and f"{name}.{last}" in dims
        }
        sizes = {prefix + name: attributes for name, attributes in narrow.sizes.items()}
        arguments = {prefix + name: of_heads for name, of_heads in narrow.arguments.items()}
        return Cut(self.block.kind, self.block.main, narrow.num_units, dims, fused, sizes, arguments)


def _chosen(values: torch.Tensor, linear: nn.Module, channels: list[int]) -> torch.Tensor:
    """Some channels of what a linear layer takes or returns."""
    return values.index_select(channel_dim(linear), torch.tensor(channels))
