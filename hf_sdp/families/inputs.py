"""A batch for a model that is on the meta device."""

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from .registered import family_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH, LENGTH = 2, 32
SAMPLES = 8000
"""Of sound, for models that take it as it is."""
IMAGE = 64
"""Height and width, for models that take images of any size."""


def example_inputs(model: "PreTrainedModel", length: int = LENGTH) -> dict[str, Any]:
    """Arguments of a forward with which all layers are called, by the names of the model's inputs.

    ``length``: tokens of a sequence.
    """
    said = family_of(model.config.model_type).inputs
    if said is not None:
        return said(model, length)
    known = inspect.signature(type(model).forward).parameters
    ids = torch.zeros(BATCH, length, dtype=torch.long, device="meta")
    result: dict[str, Any] = {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "inputs" and "input_values" in known:
        main = "input_values"
    if main in ("input_features", "input_values"):
        result[main] = torch.empty(_sound(model.config, main), device="meta")
    elif "input_ids" in known or main == "input_ids":
        result["input_ids"] = ids
    elif main == "pixel_values":
        result[main] = torch.empty(_image(model.config), device="meta")
    if "decoder_input_ids" in known:
        result["decoder_input_ids"] = ids
    if "use_cache" in known:
        result["use_cache"] = False
    return result


def _sound(config, main: str) -> tuple[int, ...]:
    """The shape of a batch of sound: samples, or features of frames. Raises ValueError."""
    if main == "input_values":
        return (BATCH, SAMPLES)
    for part in _parts(config):
        if bins := getattr(part, "num_mel_bins", None):
            if hasattr(part, "subsampling_factor"):
                return (BATCH, 4 * LENGTH, bins)
            return (BATCH, bins, 2 * getattr(part, "max_source_positions", 2 * LENGTH))
        for name in ("input_feat_per_channel", "feature_projection_input_dim"):
            if size := getattr(part, name, None):
                return (BATCH, 4 * LENGTH, size)
    raise ValueError(f"how many features {type(config).__name__} has is not known")


def _image(config) -> tuple[int, ...]:
    """The shape of a batch of images."""
    own = [part for part in _parts(config) if hasattr(part, "num_channels")]
    channels = own[0].num_channels if own else 3
    size = getattr(own[0] if own else config, "image_size", None) or IMAGE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return (BATCH, channels, height, width)


def _parts(config) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        if getattr(config, name, None) is not None:
            yield from _parts(getattr(config, name))
