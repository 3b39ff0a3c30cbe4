"""Tiny models of all model types, and batches for them."""

import copy

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from .tiny import LENGTH, VOCAB

TASKS = {
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "AutoModelForCausalLM"),
    "masked": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "AutoModelForMaskedLM"),
    "sequence to sequence": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "AutoModelForSeq2SeqLM"),
    "speech": (modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, "AutoModelForSpeechSeq2Seq"),
}
"""Task -> model types, name of the class that makes their models."""


def made(config: PreTrainedConfig, task: str) -> PreTrainedModel:
    """The model of a config, on the default device."""
    return getattr(transformers, TASKS[task][1]).from_config(copy.deepcopy(config))


def tiny_model(config: PreTrainedConfig, task: str, seed: int = 0) -> PreTrainedModel:
    """A model of a tiny config, in float32, without dropout, in which no two parameters are alike."""
    torch.manual_seed(seed)
    model = made(config, task).float().train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not torch.isfinite(p).all():
                p.normal_(0, 0.02)
            p.add_(0.02 * torch.randn(p.shape))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tiny_batch(model: PreTrainedModel, index: int = 0, size: int = 2) -> dict[str, torch.Tensor]:
    """Random tokens (or features) with their labels."""
    generator = torch.Generator().manual_seed(1000 + index)
    ids = torch.randint(3, VOCAB, (size, LENGTH), generator=generator)
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_features":
        bins, frames = model.config.num_mel_bins, 2 * model.config.max_source_positions
        return {main: torch.randn(size, bins, frames, generator=generator), "labels": ids}
    return {"input_ids": ids, "labels": ids.clone()}
