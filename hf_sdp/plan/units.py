"""Which modules of a model can be held in part, and in how many units. Reads the model's shapes only."""

import dataclasses
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from ..errors import SDPConfigError
from ..families import Structure, cuts_of, structure_of
from ..families.adapters import why_not_cut, with_adapters
from ..families.base import Cut, OfHeads, renamed, renamed_fields
from ..families.kinds import KINDS, LAYER, Kind
from ..families.layers import LINEAR, is_grouped, is_linear
from .region import Ranges, Region, Shape


@dataclass(frozen=True)
class MaskableModule:
    """A module whose tensors are cut into ``num_units`` equal parts.

    Attributes:
        name: full name of the module (block level: of the sub-block's module, or of the layer).
        kind: name of its kind; balance is kept for each kind.
        layer: position of its layer among those of all stacks.
        dims: full name of a parameter or buffer -> the dim that is cut. A tensor may belong to the module itself or to
            any module below it, and to the norm before it.
        packed: full name -> ranges along that dim, each of which is cut into ``num_units`` equal parts (fused
            projections). The whole dim is one range where a tensor is not named here.
        members: names of the modules that have its tensors, in forward order.
        sizes: name of a module -> its attributes that are proportional to the units held (``families.base.Cut``).
        arguments: name of a module -> its arguments that have something for each head (``families.base.Cut``).
        switched: names of modules with some of its tensors that a forward may leave out (``families.base.Cut``).
    """

    name: str
    kind: str
    layer: int
    num_units: int
    dims: dict[str, int]
    packed: dict[str, Ranges] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    sizes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    arguments: dict[str, OfHeads] = field(default_factory=dict)
    switched: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.members:
            object.__setattr__(self, "members", _owners(self.name, self.dims))

    @property
    def of_kind(self) -> Kind:
        return KINDS[self.kind]

    @property
    def by_owner(self) -> dict[str, dict[str, int]]:
        """``dims`` of each module that has tensors itself: its name -> the tensor's own name -> dim."""
        result: dict[str, dict[str, int]] = {}
        for full, dim in self.dims.items():
            owner, _, name = full.rpartition(".")
            result.setdefault(owner, {})[name] = dim
        return result

    def region(self, name: str, shape: Shape, first: int, last: int) -> Region:
        """What units ``first`` to ``last`` (exclusive) are of the tensor ``name``, of this full shape."""
        ranges: list[Ranges] = [((0, size),) if size else () for size in shape]
        dim = self.dims[name]
        ranges[dim] = tuple(
            (start + (stop - start) * first // self.num_units, start + (stop - start) * last // self.num_units)
            for start, stop in self.packed.get(name, ((0, shape[dim]),))
        )
        return Region(name, tuple(ranges))

    def renamed(self, old: str, new: str, layer: int) -> "MaskableModule":
        """The same of another layer: that named ``new`` instead of ``old``, at position ``layer``."""
        members = tuple(renamed(name, old, new) for name in self.members)
        return dataclasses.replace(self, layer=layer, members=members, **renamed_fields(self, old, new))

    def numel(self, shapes: dict[str, Shape]) -> int:
        """Elements of the whole module."""
        return sum(math.prod(shapes[name]) for name in self.dims)


def maskable_modules(model: nn.Module, *, level: str, block_granularity: str, chunks: int) -> list[MaskableModule]:
    """Everything that can be held or not held, in forward order.

    Args:
        model: a transformers model, on any device (meta included).
        chunks: into how many chunks (k of coverage m/k) a module is to be cut. It decides the size of an MLP unit.
    Raises: SDPConfigError when the structure of the model cannot be found, or nothing matches.
    """
    structure = structure_of(model)
    if level == "neuron":
        found = _inner_dims(model, structure, chunks)
    elif block_granularity == "layer":
        found = _layers(model, structure)
    else:
        found = _blocks(model, structure)
    if not found:
        reasons = "; ".join(why_whole(model, level, block_granularity)) or "it has no blocks"
        raise SDPConfigError(
            f"Nothing in {type(model).__name__} can be held in part at level={level!r}"
            f"{f', block_granularity={block_granularity!r}' if level == 'block' else ''}: {reasons[:300]}."
            f"{_what_works(structure)}"
        )
    return found


def why_whole(model: nn.Module, level: str, block_granularity: str = "sub-block") -> list[str]:
    """Why layers or blocks are held by all workers, each reason once (a layer stands for those that are alike)."""
    structure = structure_of(model)
    if level == "neuron":
        reasons = {block.main: cut for block in structure.blocks if isinstance(cut := cuts_of(model)[block.main], str)}
        of_blocks = {name: reason for name, reason in structure.kept.items() if name not in structure.layers}
        reasons |= of_blocks if structure.blocks else structure.kept
    elif block_granularity == "layer":
        reasons = {layer: structure.kept[layer] for layer in structure.layers if layer in structure.kept}
    else:
        reasons = {name: why for name, why in structure.kept.items() if name not in structure.absent}
    alike = {re.sub(r"\d+", "N", reason): reason for reason in reversed(reasons.values())}
    return list(reversed(alike.values()))


def _what_works(structure: Structure) -> str:
    if structure.blocks:
        return " Use level='block'."
    if any(layer in structure.absent for layer in structure.layers):
        return " Use level='block', block_granularity='layer'."
    return ""


def _layers(model: nn.Module, structure: Structure) -> list[MaskableModule]:
    names = {name for name, _ in model.named_parameters()}
    found = []
    for index, layer in enumerate(structure.layers):
        if layer in structure.absent:
            own = (f"{layer}.{p}" for p, _ in model.get_submodule(layer).named_parameters())
            found.append(MaskableModule(layer, LAYER.name, index, 1, {name: 0 for name in own if name in names}))
    return found


def _blocks(model: nn.Module, structure: Structure) -> list[MaskableModule]:
    found = []
    for block in structure.blocks:
        dims = {f"{m}.{p}": 0 for m in block.modules for p, _ in model.get_submodule(m).named_parameters()}
        found.append(MaskableModule(block.main, block.kind, block.layer, 1, dims, members=block.modules))
    return found


def _inner_dims(model: nn.Module, structure: Structure, chunks: int) -> list[MaskableModule]:
    cuts = cuts_of(model)
    found = []
    for block in sorted((*structure.blocks, *structure.summands), key=lambda block: block.layer):
        of_block = cuts[block.main]
        for cut in () if isinstance(of_block, str) else of_block:  # else all hold it
            _refuse_unknown_layers(model, cut)
            num_units = KINDS[cut.kind].num_units(cut.units, chunks)
            members = _outermost([*_owners(cut.name, cut.dims), *cut.sizes, *cut.arguments])
            cut = with_adapters(model, cut)
            module = MaskableModule(
                cut.name, cut.kind, block.layer, num_units, cut.dims, cut.packed, members, cut.sizes, cut.arguments,
                cut.switched,
            )  # fmt: skip
            found.append(module)
    return found


def _refuse_unknown_layers(model: nn.Module, cut: Cut) -> None:
    """The cut was found for the classes that the model's class makes."""
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in cut.dims):
        module = model.get_submodule(owner)
        if why := why_not_cut(module):
            raise SDPConfigError(f"{owner} has adapters that the neuron level cannot cut: {why}. Use level='block'.")
        if isinstance(module, LINEAR) and not is_linear(module) and not is_grouped(module):
            raise SDPConfigError(
                f"{owner} ({type(module).__name__}): the neuron level can cut nn.Linear, Conv1D and nn.Conv2d, and no "
                "subclass. Use level='block'."
            )


def _outermost(names: list[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(n for n in names if not any(n.startswith(other + ".") for other in names)))


def _owners(name: str, tensors: Iterable[str]) -> tuple[str, ...]:
    """The module itself, and those outside of it that a tensor is a parameter of."""
    return tuple(dict.fromkeys(name if n.startswith(name + ".") else n.rpartition(".")[0] for n in tensors))
