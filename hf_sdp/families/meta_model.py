"""The full model of a transformers config, without memory."""

import copy
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def meta_model(model_config) -> "PreTrainedModel":
    """The full model of a transformers config on the meta device: shapes without memory."""
    import transformers

    architecture = (getattr(model_config, "architectures", None) or [None])[0]
    model_class = getattr(transformers, architecture, None) if architecture else None
    with torch.device("meta"):
        if model_class is not None:
            return model_class(copy.deepcopy(model_config))
        return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model_config))
