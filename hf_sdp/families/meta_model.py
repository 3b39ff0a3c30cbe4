"""A full model without memory: of a transformers config, or as a model is."""

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM", "AutoModelForSpeechSeq2Seq",
    "AutoModelForImageTextToText", "AutoModelForImageClassification", "AutoModel",
)  # fmt: skip


def meta_model(model_config, model_class: type | None = None) -> "PreTrainedModel":
    """The full model of a transformers config on the meta device: shapes without memory.

    ``model_class``: default: the first of ``architectures``; of a config that has none, a language model of its type.
    """
    import transformers

    architecture = (getattr(model_config, "architectures", None) or [None])[0]
    cls: Any = model_class or (getattr(transformers, architecture, None) if architecture else None)
    with torch.device("meta"):
        if cls is not None:
            return cls(copy.deepcopy(model_config))
        auto_classes = [getattr(transformers, name) for name in _AUTO_CLASSES]
        known = (auto for auto in auto_classes if type(model_config) in auto._model_mapping)
        return next(known, auto_classes[0]).from_config(copy.deepcopy(model_config))


def meta_copy(model: "PreTrainedModel") -> "PreTrainedModel":
    """A copy on the meta device of a full model on any device. Parameters learn where the model's do."""
    of_tensors: dict[int, Any] = {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    for p in model.parameters():
        of_tensors[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
    return copy.deepcopy(model, of_tensors)
