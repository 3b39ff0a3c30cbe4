"""LoRA adapters in a model (PEFT): what of them is cut with the layers that they adapt, and how parameters are named.

PEFT puts a layer in the place of a linear one. It has that as its ``base_layer``, and computes
``base(x) + B(A(x)) * scaling``. B has a row for each output of the layer, and so have the magnitudes of DoRA: they are
cut as a column-wise layer is. A has a column for each input, and is cut as a row-wise layer is. The other one of the
two is shared by all workers. Source: peft/tuners/lora/layer.py.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from torch import nn

from .base import Cut, Ranges
from .layers import is_linear, linear_dim

_BASE, _ORIGINAL = "base_layer", "original_module"
_CUT_LAYERS = ("peft.tuners.lora.layer.Linear", "peft.tuners.lora.layer.Conv2d")
_CUT_VARIANTS = ("DoraLinearVariant", "DoraConv2dVariant")
_OF_COLUMNS, _OF_ROWS = ("lora_B", "lora_magnitude_vector"), ("lora_A",)


def is_peft_model(model: object) -> bool:
    """Whether it is one of PEFT, around a model of transformers."""
    return callable(getattr(type(model), "get_base_model", None)) and hasattr(model, "peft_config")


def without_peft(model: Any) -> Any:
    """The model of transformers, with adapters in it, that a model of PEFT calls; any other model as it is."""
    return model.get_base_model() if is_peft_model(model) else model


def prefix_of(model: nn.Module) -> str:
    """Of the names that the parameters of the model of transformers have in that of PEFT around it."""
    base = without_peft(model)
    return next(f"{name}." if name else "" for name, module in model.named_modules() if module is base)


def is_adapted(module: nn.Module) -> bool:
    """Whether a module stands in the place of a layer that it adapts."""
    return _BASE in module._modules and hasattr(module, "adapter_layer_names")


def adapters_in_use(model: nn.Module) -> frozenset[str]:
    """Names of the adapters that take part in a forward: none where there are none, or while they are switched off."""
    layer: Any = next(filter(is_adapted, model.modules()), None)
    return frozenset() if layer is None or layer.disable_adapters else frozenset(layer.active_adapters)


def adapted_around(model: nn.Module, name: str) -> str | None:
    """Name of the adapted layer that a module is in; None of any other module."""
    while name := name.rpartition(".")[0]:
        if is_adapted(model.get_submodule(name)):
            return name
    return None


def own_names(model: nn.Module) -> dict[str, str]:
    """Name of a parameter -> the one that it has without PEFT. What PEFT has added is left out."""
    result = {}
    for name, _ in model.named_parameters(remove_duplicate=False):
        module: Any = model
        path = []
        for child in name.split("."):
            if not _stands_for_another(module):
                path.append(child)
            elif child not in (_BASE, _ORIGINAL):
                break
            module = module._modules.get(child)
        else:
            result[name] = ".".join(path)
    return result


def _stands_for_another(module: nn.Module) -> bool:
    return is_adapted(module) or _ORIGINAL in module._modules


def with_adapters(model: nn.Module, cut: Cut) -> Cut:
    """The cut of a model with adapters: theirs with the layers that they adapt, by the names that these have there."""
    dims: dict[str, int] = {}
    packed: dict[str, Ranges] = {}
    switched = []
    for name, dim in cut.dims.items():
        owner, _, last = name.rpartition(".")
        layer: Any = model.get_submodule(owner)
        if not is_adapted(layer):
            with_name = {name: dim}
        else:
            with_name = {f"{owner}.{_BASE}.{last}": dim}
            if last == "weight":
                found = dict(_tensors(layer, linear_dim(layer.base_layer, dim) == 1))
                with_name |= {f"{owner}.{own}": its_dim for own, its_dim in found.items()}
                switched += [f"{owner}.{own.rpartition('.')[0]}" for own in found]
        dims |= with_name
        if name in cut.packed:
            packed |= dict.fromkeys(with_name, cut.packed[name])
    return dataclasses.replace(cut, dims=dims, packed=packed, switched=tuple(dict.fromkeys(switched)))


def _tensors(layer: nn.Module, is_rows: bool) -> Iterator[tuple[str, int]]:
    """Parameters of all adapters of a layer that are cut with it: name, and the dim of its outputs or inputs."""
    for kind in _OF_ROWS if is_rows else _OF_COLUMNS:
        for adapter, module in getattr(layer, kind, {}).items():
            for last, p in module._parameters.items():
                if p is not None:
                    of_outputs = 1 if kind == "lora_magnitude_vector" and p.dim() > 1 else 0  # a convolution's
                    yield f"{kind}.{adapter}.{last}", 1 if is_rows else of_outputs


def why_not_cut(module: Any) -> str | None:
    """Why a module that PEFT has put in a layer's place cannot be cut; None of any other module, and where it can."""
    if _ORIGINAL in module._modules:
        return "it is in modules_to_save"
    if not is_adapted(module):
        return None
    cls = f"{type(module).__module__}.{type(module).__qualname__}"
    if cls not in _CUT_LAYERS or not is_linear(module.base_layer):
        return f"{cls} around {type(module.base_layer).__name__}"
    variants = [type(variant).__name__ for variant in getattr(module, "lora_variant", {}).values()]
    return next((name for name in variants if name not in _CUT_VARIANTS), None)
