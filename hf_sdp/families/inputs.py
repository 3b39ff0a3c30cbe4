"""A batch for a model that is on the meta device."""

import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH, LENGTH = 2, 32


def example_inputs(model: "PreTrainedModel", length: int = LENGTH) -> dict[str, Any]:
    """Arguments of a forward with which all layers are called, by the names of the model's inputs.

    ``length``: tokens of a sequence.
    """
    known = inspect.signature(type(model).forward).parameters
    config = model.config
    ids = torch.zeros(BATCH, length, dtype=torch.long, device="meta")
    result: dict[str, Any] = {}
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_features":
        frames = 2 * getattr(config, "max_source_positions", LENGTH)
        result[main] = torch.empty(BATCH, config.num_mel_bins, frames, device="meta")
    elif "input_ids" in known or main == "input_ids":
        result["input_ids"] = ids
    if "decoder_input_ids" in known:
        result["decoder_input_ids"] = ids
    if "use_cache" in known:
        result["use_cache"] = False
    return result
