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
    names = {module: name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embeddings, nn.Module) or getattr(embeddings, "weight", None) is None:
        return ()
    if not isinstance(head, nn.Module) or getattr(head, "weight", None) is None:
        return ((names[embeddings],),)
    if head.weight is embeddings.weight:
        return ((names[embeddings], names[head]),)
    return ((names[embeddings],), (names[head],))
