"""``structure_of``: the structure of a model, found once for each class and config."""

import contextlib
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import SDPConfigError
from .absent import Absent
from .base import Block, CannotCut, Cut, Structure
from .cuts import find_cuts
from .finding import Found, find_blocks
from .layers import likeness
from .model_config import config_key
from .recording import Recording, record
from .registered import Family, family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class _Known:
    """Of one class and config: the model on the meta device, its recording, what was found, and what was tried."""

    model: nn.Module
    recording: Recording
    found: Found
    cuts: dict[str, tuple[Cut, ...] | str] | None = None


_REMEDY = "hf_sdp.register_family says what is not found (hf_sdp/FAMILIES.md)."
_cache: dict[tuple[type, Family, str], _Known] = {}


def structure_of(model: "PreTrainedModel") -> Structure:
    """The structure of a full transformers model, on any device. Nothing is allocated or changed.

    Raises: SDPConfigError when the class of the model cannot run on the meta device, or no layers are found.
    """
    found = _known(type(model), model.config).found
    outer = _outer(model)
    return Structure(tuple(found.layers), outer, tuple(found.blocks), found.absent, found.kept, tuple(found.summands))


def cuts_of(model: "PreTrainedModel") -> dict[str, tuple[Cut, ...] | str]:
    """For each block and summand of a full model, by its name, how its inner widths are cut, or why they cannot be.

    Raises: as :func:`structure_of`.
    """
    known = _known(type(model), model.config)
    if known.cuts is None:
        known.cuts = {}
        tried: dict[tuple, tuple[str, tuple[Cut, ...] | str]] = {}
        for block in (*known.found.blocks, *known.found.summands):
            layer = known.found.layers[block.layer]
            module = known.model.get_submodule(layer)
            key = (likeness(module), tuple(name.removeprefix(layer) for name in block.modules))
            if key not in tried:
                tried[key] = layer, _cut(known, layer, block)
            of_layer, cut = tried[key]
            if not isinstance(cut, str):
                cut = tuple(one.renamed(of_layer, layer) for one in cut)
            known.cuts[block.main] = cut
    return known.cuts


def _cut(known: _Known, layer: str, block: Block) -> tuple[Cut, ...] | str:
    others = {
        name: Absent(type(known.model.get_submodule(name)), known.found.absent[name])
        for other in known.found.blocks
        if other.layer == block.layer and other is not block
        for name in other.modules
    }
    try:
        return find_cuts(known.model, known.recording, layer, block, others)
    except CannotCut as error:
        return str(error)


def _known(cls: type["PreTrainedModel"], config) -> _Known:
    key = (cls, family_of(config.model_type), config_key(config))
    if key not in _cache:
        try:
            with torch.device("meta"):
                model = cls(copy.deepcopy(config))
            recording = record(model)
            found = find_blocks(model, recording, family_of(config.model_type))
        except SDPConfigError:
            raise
        except Exception as error:  # whatever the class says
            raise SDPConfigError(
                f"The residual blocks of {cls.__name__} (model_type={config.model_type!r}) cannot be found: "
                f"on the meta device it raises {type(error).__name__}: {error}. {_REMEDY}"
            ) from error
        if not found.layers:
            raise SDPConfigError(
                f"{cls.__name__} (model_type={config.model_type!r}) has no stack of layers: no list of modules of one "
                f"of the classes that it must not split. {_REMEDY}"
            )
        recording.forget_arguments(set(found.layers))
        _cache[key] = _Known(model, recording, found)
    return _cache[key]


def _outer(model: "PreTrainedModel") -> tuple[tuple[str, ...], ...]:
    """Modules by weight. A weight that other modules have as well (an encoder's and a decoder's embeddings) is left to
    the model itself: which of its modules are called differs from class to class."""
    names = {module: name for name, module in model.named_modules()}
    by_weight: dict[int, list[nn.Module]] = {}
    for find in (model.get_input_embeddings, model.get_output_embeddings):
        module = None
        with contextlib.suppress(NotImplementedError):  # of a model that embeds no tokens
            module = find()
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Module) and weight is not None:
            by_weight.setdefault(id(weight), []).append(module)
    owners = {key: [m for m in names if id(m._parameters.get("weight")) == key] for key in by_weight}
    return tuple(
        tuple(names[module] for module in modules)
        for key, modules in by_weight.items()
        if set(owners[key]) <= set(modules)
    )
