"""Tiny models of all model types, and batches for them."""

import copy

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ...families.inputs import BATCH, LENGTH, example_inputs
from .tiny import VOCAB

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
        for p in model.parameters():
            if not torch.isfinite(p).all():
                p.normal_(0, 0.02)
            p.add_(0.02 * torch.randn(p.shape))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def tiny_batch(model: PreTrainedModel, index: int = 0) -> dict[str, torch.Tensor]:
    """Random tokens, or sound, with their labels."""
    generator = torch.Generator().manual_seed(1000 + index)
    inputs = example_inputs(model)
    batch = {name: torch.randn(t.shape, generator=generator) for name, t in inputs.items() if _is_sound(t)}
    labels = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
    if "input_ids" in inputs:
        batch["input_ids"] = labels.clone()
    return {**batch, "labels": labels}


def _is_sound(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
