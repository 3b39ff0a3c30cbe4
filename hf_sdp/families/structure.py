"""``structure_of``: the structure of a model, found once for each class and config."""

import copy
import json
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import SDPConfigError
from .base import Structure
from .finding import Found, find_blocks
from .recording import record

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_cache: dict[tuple[type, str], Found] = {}


def structure_of(model: "PreTrainedModel") -> Structure:
    """The structure of a full transformers model, on any device. Nothing is allocated or changed.

    Raises: SDPConfigError when the class of the model cannot run on the meta device, or no layers are found.
    """
    found = _found(type(model), model.config)
    return Structure(tuple(found.layers), _outer(model), tuple(found.blocks), found.absent, found.kept)


def _found(cls: type["PreTrainedModel"], config) -> Found:
    key = (cls, json.dumps(config.to_dict(), sort_keys=True, default=str))
    if key not in _cache:
        try:
            with torch.device("meta"):
                model = cls(copy.deepcopy(config))
            found = find_blocks(model, record(model))
        except Exception as error:  # whatever the class says
            raise SDPConfigError(
                f"The residual blocks of {cls.__name__} (model_type={config.model_type!r}) cannot be found: "
                f"on the meta device it raises {type(error).__name__}: {error}"
            ) from error
        if not found.layers:
            raise SDPConfigError(
                f"{cls.__name__} (model_type={config.model_type!r}) has no stack of layers: no list of modules of one "
                "of the classes that it must not split."
            )
        _cache[key] = found
    return _cache[key]


def _outer(model: "PreTrainedModel") -> tuple[tuple[str, ...], ...]:
    """Modules by weight. A weight that other modules have as well (an encoder's and a decoder's embeddings) is left to
    the model itself: which of its modules are called differs from class to class."""
    names = {module: name for name, module in model.named_modules()}
    by_weight: dict[int, list[nn.Module]] = {}
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Module) and weight is not None:
            by_weight.setdefault(id(weight), []).append(module)
    owners = {key: [m for m in names if id(m._parameters.get("weight")) == key] for key in by_weight}
    return tuple(
        tuple(names[module] for module in modules)
        for key, modules in by_weight.items()
        if set(owners[key]) <= set(modules)
    )
