"""Names and shapes of the full model of a config, asked for once."""

import json
from dataclasses import dataclass

from transformers import PreTrainedConfig

from ..families import Structure, structure_of
from ..families.meta_model import meta_model
from ..plan.region import Shape


@dataclass(frozen=True)
class ModelShapes:
    """``tensors``: full parameter name -> shape, tied parameters once."""

    structure: Structure
    tensors: dict[str, Shape]


_cache: dict[str, ModelShapes] = {}


def config_key(model_config: PreTrainedConfig) -> str:
    """Equal for equal configs."""
    return json.dumps(model_config.to_dict(), sort_keys=True, default=str)


def shapes_of(model_config: PreTrainedConfig) -> ModelShapes:
    """Raises: SDPConfigError when the family is unknown."""
    key = config_key(model_config)
    if key not in _cache:
        model = meta_model(model_config)
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        _cache[key] = ModelShapes(structure_of(model), shapes)
    return _cache[key]
