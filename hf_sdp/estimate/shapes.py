"""Names and shapes of a full model, asked for once."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import SDPConfigError
from ..families import Structure, structure_of
from ..families.adapters import without_peft
from ..families.meta_model import meta_copy, meta_model
from ..families.model_config import config_key
from ..plan.region import Shape

Model: TypeAlias = PreTrainedConfig | nn.Module
"""The full model of a config; or a model, on any device, with its adapters (PEFT) and what of it is frozen."""


@dataclass(frozen=True)
class ModelShapes:
    """Of a full model.

    Attributes:
        key: equal for models of equal layers and shapes, of which the same is frozen.
        model: on the meta device, never changed.
        tensors: full parameter name -> shape, tied parameters once.
        frozen: names of those that do not learn.
        layer_types: equal for layers that compute alike.
    """

    key: Hashable
    model: PreTrainedModel
    structure: Structure
    tensors: dict[str, Shape]
    frozen: frozenset[str]
    layer_types: tuple[Hashable, ...]

    @cached_property
    def stacks(self) -> tuple[str, ...]:
        """Names of the lists that have the layers."""
        return tuple(dict.fromkeys(layer.rpartition(".")[0] for layer in self.structure.layers))

    @cached_property
    def is_traced_whole(self) -> bool:
        """And not put together from pieces (``trace.py``)."""
        layers = (self.model.get_submodule(layer) for layer in self.structure.layers)
        return len(self.stacks) > 1 or not all(any(p.requires_grad for p in layer.parameters()) for layer in layers)


_cache: dict[Hashable, ModelShapes] = {}


def shapes_of(model: Model) -> ModelShapes:
    """Raises: SDPConfigError when the family is unknown, or parameters are quantized."""
    model = without_peft(model)
    key = config_key(model) if isinstance(model, PreTrainedConfig) else _key(model)
    if key not in _cache:
        on_meta = meta_model(model) if isinstance(model, PreTrainedConfig) else meta_copy(model)
        shapes = {name: tuple(p.shape) for name, p in on_meta.named_parameters()}
        frozen = frozenset(name for name, p in on_meta.named_parameters() if not p.requires_grad)
        structure = structure_of(on_meta)
        _cache[key] = ModelShapes(key, on_meta, structure, shapes, frozen, _layer_types(on_meta, structure))
    return _cache[key]


def _key(model: PreTrainedModel) -> Hashable:
    for name, p in model.named_parameters():
        if type(p) is not nn.Parameter or not p.is_floating_point():
            raise SDPConfigError(
                f"{name} is a {type(p).__name__} of {p.dtype}: what quantized or sharded parameters take is not "
                "estimated. Use a plain model, or its config."
            )
    modules = tuple((name, type(module)) for name, module in model.named_modules())
    parameters = tuple((name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters())
    return config_key(model.config), modules, parameters


def _layer_types(model: nn.Module, structure: Structure) -> tuple[Hashable, ...]:
    """The modules of each layer, the shapes of their parameters, and which of these learn."""
    return tuple(
        tuple(
            (type(module), *((tuple(p.shape), p.requires_grad) for p in module.parameters(recurse=False)))
            for module in model.get_submodule(layer).modules()
        )
        for layer in structure.layers
    )
