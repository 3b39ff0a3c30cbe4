"""Names and shapes of the full model of a config, asked for once."""

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from transformers import PreTrainedConfig

from ..families import Structure, structure_of
from ..families.meta_model import meta_model
from ..families.model_config import config_key
from ..plan.region import Shape


@dataclass(frozen=True)
class ModelShapes:
    """Of a full model.

    Attributes:
        tensors: full parameter name -> shape, tied parameters once.
        frozen: names of those that the model's class freezes.
        layer_types: equal for layers that compute alike.
    """

    structure: Structure
    tensors: dict[str, Shape]
    frozen: frozenset[str]
    layer_types: tuple[Hashable, ...]

    @cached_property
    def stacks(self) -> tuple[str, ...]:
        """Names of the lists that have the layers."""
        return tuple(dict.fromkeys(layer.rpartition(".")[0] for layer in self.structure.layers))

    @property
    def is_traced_whole(self) -> bool:
        """And not put together from pieces (``trace.py``)."""
        return len(self.stacks) > 1


_cache: dict[str, ModelShapes] = {}


def shapes_of(model_config: PreTrainedConfig) -> ModelShapes:
    """Raises: SDPConfigError when the family is unknown."""
    key = config_key(model_config)
    if key not in _cache:
        model = meta_model(model_config)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        frozen = frozenset(name for name, p in model.named_parameters() if not p.requires_grad)
        structure = structure_of(model)
        _cache[key] = ModelShapes(structure, shapes, frozen, _layer_types(model, structure))
    return _cache[key]


def _layer_types(model: nn.Module, structure: Structure) -> tuple[Hashable, ...]:
    """The modules of each layer, and the shapes of their parameters."""
    return tuple(
        tuple(
            (type(module), *(tuple(p.shape) for p in module.parameters(recurse=False)))
            for module in model.get_submodule(layer).modules()
        )
        for layer in structure.layers
    )
