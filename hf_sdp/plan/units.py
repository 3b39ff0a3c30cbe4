"""Which modules of a model can be held in part, and in how many units. Reads the model's shapes only."""

import re
from dataclasses import dataclass

from torch import nn

from ..errors import SDPConfigError
from ..families import Family, family_of


@dataclass(frozen=True)
class MaskableModule:
    """A module whose parameters are cut into ``num_units`` equal ranges, all along the dims given.

    Attributes:
        name: full name of the module (block level: of the sub-block's module, or of the layer).
        kind: "attention", "mlp" or "layer"; balance is kept per kind.
        layer: index of the decoder layer.
        dims: full parameter name -> the dim that is cut. Its size is a multiple of ``num_units``.
    """

    name: str
    kind: str
    layer: int
    num_units: int
    dims: dict[str, int]


def decoder_layers(model: nn.Module, family: Family) -> tuple[str, nn.ModuleList]:
    """Full name and module of the list of decoder layers."""
    prefix = model.base_model_prefix + "." if model.base_model is not model else ""
    name = prefix + family.layers
    return name, model.get_submodule(name)


def maskable_modules(model: nn.Module, *, level: str, block_granularity: str, chunks: int) -> list[MaskableModule]:
    """Everything that can be held or not held, in forward order.

    Args:
        model: a transformers model, on any device (meta included).
        chunks: into how many chunks (k of coverage m/k) a module is to be cut; decides the size of an MLP unit.
    Raises: SDPConfigError when the family is unknown or nothing matches.
    """
    family = family_of(model.config)
    found = _blocks(model, family, block_granularity) if level == "block" else _inner_dims(model, family, chunks)
    if not found:
        raise SDPConfigError(
            f"Nothing in {type(model).__name__} can be held in part at level={level!r}: no decoder layer under "
            f"{family.layers!r} has a module that its tensor-parallel plan "
            f"({getattr(model.config, 'base_model_tp_plan', None)!r}) cuts."
        )
    return found


def _blocks(model: nn.Module, family: Family, granularity: str) -> list[MaskableModule]:
    prefix, layers = decoder_layers(model, family)
    found = []
    for index, layer in enumerate(layers):
        name = f"{prefix}.{index}"
        if granularity == "layer":
            dims = {f"{name}.{p}": 0 for p, _ in layer.named_parameters()}
            found.append(MaskableModule(name, "layer", index, 1, dims))
            continue
        for block in family.blocks:
            dims = {
                f"{name}.{child}.{p}": 0
                for child in (block.norm, block.module)
                for p, _ in layer.get_submodule(child).named_parameters()
            }
            found.append(MaskableModule(f"{name}.{block.module}", block.kind, index, 1, dims))
    return found


def _inner_dims(model: nn.Module, family: Family, chunks: int) -> list[MaskableModule]:
    prefix, layers = decoder_layers(model, family)
    tp_plan = getattr(model.config, "base_model_tp_plan", None) or {}
    found = []
    for index, layer in enumerate(layers):
        for block in family.blocks:
            module = layer.get_submodule(block.module)
            styles = {
                child: style
                for child, _ in module.named_children()
                if (style := _tp_style(tp_plan, f"{family.layers}.{index}.{block.module}.{child}"))
            }
            if not styles:
                continue
            name = f"{prefix}.{index}.{block.module}"
            dims, widths = {}, {}
            for child, style in styles.items():
                linear = module.get_submodule(child)
                if style not in ("colwise", "rowwise") or not isinstance(linear, nn.Linear):
                    raise SDPConfigError(
                        f"{name}.{child} ({type(linear).__name__}) has tensor-parallel style {style!r}; the neuron level "
                        "can cut nn.Linear layers of style 'colwise' and 'rowwise'. Use level='block'."
                    )
                columns = style == "colwise"
                dims[f"{name}.{child}.weight"] = 0 if columns else 1
                widths[child] = linear.out_features if columns else linear.in_features
                if columns and linear.bias is not None:
                    dims[f"{name}.{child}.bias"] = 0
            if block.kind == "attention":
                num_units = model.config.num_key_value_heads
            else:
                num_units = _mlp_units(min(widths.values()), chunks)
            if any(width % num_units for width in widths.values()):
                raise SDPConfigError(f"{name}: widths {widths} cannot all be cut into {num_units} units.")
            found.append(MaskableModule(name, block.kind, index, num_units, dims))
    return found


def _tp_style(tp_plan: dict[str, str], name: str) -> str | None:
    for pattern, style in tp_plan.items():
        if re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), name):
            return style
    return None


def _mlp_units(num_neurons: int, chunks: int) -> int:
    """Neurons are grouped as coarsely as even chunks allow, at most 128: narrow matrices keep sizes that matrix
    units like, and a plan stays small. Without even chunks, as coarsely as leaves one unit for each."""
    group_sizes = [g for g in (128, 64, 32, 16, 8, 4, 2, 1) if num_neurons % g == 0]
    even = (num_neurons // g for g in group_sizes if (num_neurons // g) % chunks == 0)
    uneven = (num_neurons // g for g in group_sizes if num_neurons // g >= chunks)
    return next(even, None) or next(uneven, num_neurons)
