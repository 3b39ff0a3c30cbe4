"""Tiny models of all model types, and batches for them."""

import copy

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from ...families.inputs import BATCH, LENGTH, example_inputs
from .tiny import END, VOCAB

TASKS = {
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "AutoModelForCausalLM"),
    "masked": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "AutoModelForMaskedLM"),
    "sequence to sequence": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "AutoModelForSeq2SeqLM"),
    "speech": (modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, "AutoModelForSpeechSeq2Seq"),
    "sequence classification": (
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForSequenceClassification",
    ),
    "token classification": (
        modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForTokenClassification",
    ),
    "question answering": (
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
        "AutoModelForQuestionAnswering",
    ),
    "image-text-to-text": (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        "AutoModelForImageTextToText",
    ),
    "image classification": (
        modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForImageClassification",
    ),
}
"""Task -> model types, name of the class that makes their models."""


def made(config: PreTrainedConfig, task: str) -> PreTrainedModel:
    """The model of a config, on the default device."""
    types, auto_class = TASKS[task]
    config, classes = copy.deepcopy(config), types[config.model_type]
    if not isinstance(classes, str):
        config.architectures = [classes[0]]  # of several
    return getattr(transformers, auto_class).from_config(config)


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


def tiny_batch(model: PreTrainedModel, index: int = 0, *, task: str | None = None) -> dict[str, torch.Tensor]:
    """Random tokens, sound or images, with the labels of a task; by default those of a language model, which gets no
    images."""
    generator = torch.Generator().manual_seed(1000 + index)
    inputs = example_inputs(model)
    batch = {name: torch.randn(t.shape, generator=generator) for name, t in inputs.items() if _is_signal(t)}
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator)
    if task == "sequence classification":
        ids[:, -1] = END  # BART's head reads the stream there
    if "input_ids" in inputs:
        batch["input_ids"] = ids.clone()
    return {**batch, **_labels(model, task, ids, generator)}


def _is_signal(value) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _labels(
    model: PreTrainedModel, task: str | None, ids: torch.Tensor, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Those of a task, by the names of the model's arguments; of one class they are numbers (a reward)."""
    batch, length = ids.shape
    if task == "question answering":
        names = ("start_positions", "end_positions")
        return {name: torch.randint(length, (batch,), generator=generator) for name in names}
    if task not in ("sequence classification", "token classification", "image classification"):
        return {"labels": ids}
    shape = (batch, length) if task == "token classification" else (batch,)
    if model.config.num_labels == 1:
        return {"labels": torch.randn(shape, generator=generator)}
    return {"labels": torch.randint(model.config.num_labels, shape, generator=generator)}
