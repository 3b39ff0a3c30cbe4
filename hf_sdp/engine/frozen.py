"""Frozen parameters: the order of reductions must not depend on what a worker holds.

FSDP2 reduces a group when the gradient of its inputs is there. A group whose inputs need no gradient is reduced in its
last callback instead, after the root. With frozen embeddings, or ``inputs_embeds``, that is the first block that has
something to learn, and at block level it differs between workers: they would wait for each other for ever.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def let_inputs_need_gradients(model: "PreTrainedModel") -> None:
    """In training, what the embeddings give and what is passed as ``inputs_embeds`` needs a gradient from now on.

    Where it needed none, the backward goes on to the first block. Nothing is learned there that was not.
    """
    model.get_input_embeddings().register_forward_hook(_after_embeddings)
    model.register_forward_pre_hook(_before_model, with_kwargs=True)


def _after_embeddings(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
    return _needs_gradient(output)


def _before_model(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    if isinstance(kwargs.get("inputs_embeds"), torch.Tensor):
        kwargs = {**kwargs, "inputs_embeds": _needs_gradient(kwargs["inputs_embeds"])}
    return args, kwargs


def _needs_gradient(tensor: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled() or tensor.requires_grad or not tensor.is_floating_point():
        return tensor
    return tensor.detach().requires_grad_()
