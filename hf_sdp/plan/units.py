"""Which modules of a model can be held in part, and in how many units. Reads the model's shapes only."""

import math
import re
from dataclasses import dataclass, field

from torch import nn

from ..errors import SDPConfigError
from ..families import Stack
from ..families.kinds import KINDS, LAYER, Kind
from ..families.structure import stack_layers
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
    """

    name: str
    kind: str
    layer: int
    num_units: int
    dims: dict[str, int]
    packed: dict[str, Ranges] = field(default_factory=dict)

    @property
    def of_kind(self) -> Kind:
        return KINDS[self.kind]

    @property
    def members(self) -> tuple[str, ...]:
        """Names of the modules that have its tensors: norms outside of it, and itself; in forward order."""
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

    def weight_numel(self, shapes: dict[str, Shape]) -> int:
        """Elements of its matrices: each is multiplied once for a token."""
        return sum(math.prod(shapes[name]) for name in self.dims if len(shapes[name]) == 2)


_SHARED = ("replicated_with_grad_allreduce",)
"""Styles of modules that every head needs whole (norms of the size of a head): all workers hold them."""


def maskable_modules(model: nn.Module, *, level: str, block_granularity: str, chunks: int) -> list[MaskableModule]:
    """Everything that can be held or not held, in forward order.

    Args:
        model: a transformers model, on any device (meta included).
        chunks: into how many chunks (k of coverage m/k) a module is to be cut. It decides the size of an MLP unit.
    Raises: SDPConfigError when the family is unknown or nothing matches.
    """
    found: list[MaskableModule] = []
    for index, (stack, name, layer) in enumerate(stack_layers(model)):
        if level == "neuron":
            found += _inner_dims(model.config, stack, index, name, layer, chunks)
        elif block_granularity == "layer":
            dims = {f"{name}.{p}": 0 for p, _ in layer.named_parameters()}
            found.append(MaskableModule(name, LAYER.name, index, 1, dims))
        else:
            found += _blocks(stack, index, name, layer)
    if not found:
        raise SDPConfigError(
            f"Nothing in {type(model).__name__} can be held in part at level={level!r}: no layer has a module that its "
            f"tensor-parallel plan ({getattr(model.config, 'base_model_tp_plan', None)!r}) cuts."
        )
    return found


def _blocks(stack: Stack, index: int, name: str, layer: nn.Module) -> list[MaskableModule]:
    found = []
    for block in stack.blocks:
        dims = {
            f"{name}.{child}.{p}": 0
            for child in (block.norm, block.module)
            for p, _ in layer.get_submodule(child).named_parameters()
        }
        found.append(MaskableModule(f"{name}.{block.module}", block.kind.name, index, 1, dims))
    return found


def _inner_dims(config, stack: Stack, index: int, layer_name: str, layer: nn.Module, chunks: int):
    tp_plan = getattr(config, "base_model_tp_plan", None) or {}
    found = []
    for block in stack.blocks:
        module, name = layer.get_submodule(block.module), f"{layer_name}.{block.module}"
        dims: dict[str, int] = {}
        widths: dict[str, int] = {}
        for child, linear in module.named_children():
            style = _tp_style(tp_plan, f"{stack.layers}.{index}.{block.module}.{child}")
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
            continue
        num_units = block.kind.num_units(config, min(widths.values()), chunks)
        if any(width % num_units for width in widths.values()):
            raise SDPConfigError(f"{name}: widths {widths} cannot all be cut into {num_units} units.")
        found.append(MaskableModule(name, block.kind.name, index, num_units, dims))
    return found


def _tp_style(tp_plan: dict[str, str], name: str) -> str | None:
    for pattern, style in tp_plan.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name):
            return style
    return None
