"""Frozen parameters: the order of reductions must not depend on what a worker holds.

FSDP2 reduces a group when the gradient of its inputs is there. A group whose inputs need no gradient is reduced in its
last callback instead, after the root. With frozen embeddings, or ``inputs_embeds``, that is the first block that has
something to learn, and at block level it differs between workers: they would wait for each other for ever.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


def let_inputs_need_gradients(model: nn.Module, layers: Iterable[str]) -> None:
    """In training, what goes into a stack of layers needs a gradient from now on.

    Where it needed none, the backward goes on to the first block. Nothing is learned there that was not.
    """
    for layer in layers:  # before FSDP2's own hook, where a layer is a group
        model.get_submodule(layer).register_forward_pre_hook(_before_layer, prepend=True, with_kwargs=True)


def _before_layer(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The first tensor is the stream: of all layers but a stack's first it needs a gradient already."""
    if args and isinstance(args[0], torch.Tensor):
        return (_needs_gradient(args[0]), *args[1:]), kwargs
    stream = next((name for name, value in kwargs.items() if isinstance(value, torch.Tensor)), None)
    return args, kwargs if stream is None else {**kwargs, stream: _needs_gradient(kwargs[stream])}


def _needs_gradient(tensor: torch.Tensor) -> torch.Tensor:
    if not torch.is_grad_enabled() or tensor.requires_grad or not tensor.is_floating_point():
        return tensor
    return tensor.detach().requires_grad_()
