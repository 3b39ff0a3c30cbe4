"""Which modules of a model can be held in part, and in how many units. Reads the model's shapes only."""

import math
import re
from dataclasses import dataclass, field

from torch import nn

from ..errors import SDPConfigError
from ..families import Block, Structure, structure_of
from ..families.kinds import KINDS, LAYER, Kind
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
    """

    name: str
    kind: str
    layer: int
    num_units: int
    dims: dict[str, int]
    packed: dict[str, Ranges] = field(default_factory=dict)
    members: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.members:
            object.__setattr__(self, "members", self._owners())

    @property
    def of_kind(self) -> Kind:
        return KINDS[self.kind]

    def _owners(self) -> tuple[str, ...]:
        """Itself, and those outside of it that a tensor is a parameter of."""
        own = self.name + "."
        return tuple(dict.fromkeys(self.name if n.startswith(own) else n.rpartition(".")[0] for n in self.dims))

    def region(self, name: str, shape: Shape, first: int, last: int) -> Region:
        """What units ``first`` to ``last`` (exclusive) are of the tensor ``name``, of this full shape."""
        ranges: list[Ranges] = [((0, size),) if size else () for size in shape]
        dim = self.dims[name]
        ranges[dim] = tuple(
            (start + (stop - start) * first // self.num_units, start + (stop - start) * last // self.num_units)
            for start, stop in self.packed.get(name, ((0, shape[dim]),))
        )
        return Region(name, tuple(ranges))

    def numel(self, shapes: dict[str, Shape]) -> int:
        """Elements of the whole module."""
        return sum(math.prod(shapes[name]) for name in self.dims)


_SHARED = ("replicated_with_grad_allreduce",)
"""Styles of modules that every head needs whole (norms of the size of a head): all workers hold them."""


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
        reasons = "; ".join(structure.kept.values()) or "its tensor-parallel plan cuts no module"
        raise SDPConfigError(
            f"Nothing in {type(model).__name__} can be held in part at level={level!r}"
            f"{f', block_granularity={block_granularity!r}' if level == 'block' else ''}: {reasons[:300]}."
            f"{_what_works(structure)}"
        )
    return found


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
    found = []
    for block in structure.blocks:
        cut = _cut(model, block, chunks)
        if cut is not None:
            found.append(cut)
    return found


def _cut(model: nn.Module, block: Block, chunks: int) -> MaskableModule | None:
    tp_plan = getattr(model, "_tp_plan", None) or {}
    name, kind, config = block.main, KINDS[block.kind], model.config
    dims: dict[str, int] = {}
    widths: dict[str, int] = {}
    for child, linear in model.get_submodule(name).named_children():
        style = _tp_style(tp_plan, f"{name}.{child}")
        if not style or style in _SHARED:
            continue
        # Exactly nn.Linear: what a subclass does beyond it would not be cut with it.
        if style not in ("colwise", "rowwise") or type(linear) is not nn.Linear:
            raise SDPConfigError(
                f"{name}.{child} ({type(linear).__name__}) has tensor-parallel style {style!r}; the neuron level "
                "can cut nn.Linear layers of style 'colwise' and 'rowwise', and no subclass. Use level='block'."
            )
        columns = style == "colwise"
        dims[f"{name}.{child}.weight"] = 0 if columns else 1
        widths[child] = linear.out_features if columns else linear.in_features
        if columns and linear.bias is not None:
            dims[f"{name}.{child}.bias"] = 0
    if not dims:
        return None
    num_units = kind.num_units(config, min(widths.values()), chunks)
    if any(width % num_units for width in widths.values()):
        raise SDPConfigError(f"{name}: widths {widths} cannot all be cut into {num_units} units.")
    return MaskableModule(name, block.kind, block.layer, num_units, dims)


def _tp_style(tp_plan: dict[str, str], name: str) -> str | None:
    for pattern, style in tp_plan.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name):
            return style
    return None
