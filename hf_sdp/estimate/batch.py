"""A micro-batch for any model, with its labels."""

import torch
from transformers import PreTrainedModel

from ..families.inputs import example_inputs


def training_batch(
    model: PreTrainedModel, num_sequences: int, length: int, device: torch.device | str = "meta"
) -> dict[str, torch.Tensor]:
    """Arguments of a training forward, all zero.

    Sequences have ``length`` tokens, those of an encoder and those of a decoder, which the model makes of the labels.
    Sound is as long as the config of the model has it, and so large are images, which have one label each. ``model``:
    not patched, on any device.
    """
    ids = torch.zeros(num_sequences, length, dtype=torch.long, device=device)
    inputs = example_inputs(model, length)
    sound = {
        name: torch.zeros(num_sequences, *value.shape[1:], dtype=model.dtype, device=device)
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }
    if "pixel_values" in sound:
        return {**sound, "labels": ids[:, 0]}
    return {**sound, **{name: ids for name in ("input_ids",) if name in inputs}, "labels": ids}
