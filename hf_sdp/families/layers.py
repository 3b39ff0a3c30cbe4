"""What is known of single modules: linear layers, experts, attributes that are sizes."""

import functools
import re
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers.pytorch_utils import Conv1D

from .narrow_config import NarrowConfig

LINEAR = (nn.Linear, Conv1D, nn.Conv2d)
"""Classes of layers that multiply with a matrix. That of ``Conv1D`` (GPT-2) is transposed; a convolution has one for
each place of its kernel."""
STATISTICS = ("running_mean", "running_var")
"""Buffers of a batch norm, with an element for each of its features."""


@functools.cache
def _is_linear(cls: type) -> bool:
    if not issubclass(cls, nn.Linear) or not cls.__module__.startswith("transformers."):
        return cls in LINEAR
    with torch.random.fork_rng(devices=[]):  # the process draws what it would without this
        linear, x = nn.Linear(3, 2), torch.randn(4, 3)
    expected = linear(x)
    linear.__class__ = cls
    try:
        return torch.allclose(linear(x), expected)
    except Exception:  # it needs more than a linear layer has
        return False


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies with its matrix, and does nothing else. Of subclasses, only those of transformers."""
    return _is_linear(type(module)) and not is_grouped(module)  # type: ignore[arg-type]


def is_grouped(module: nn.Module) -> bool:
    """Whether a module convolves groups of channels apart from each other (depthwise: each channel)."""
    return type(module) is nn.Conv2d and module.groups > 1


def has_statistics(module: nn.Module) -> bool:
    """Whether a module is a batch norm that keeps running statistics."""
    return isinstance(module, _BatchNorm) and all(module._buffers.get(name) is not None for name in STATISTICS)


def channel_dim(linear: nn.Module) -> int:
    """Of what a linear layer takes and returns, the dim that it multiplies."""
    return 1 if isinstance(linear, nn.Conv2d) else -1


def linear_dim(module: nn.Module, dim: int) -> int:
    """0 for column-wise layers, 1 for row-wise ones, of the dim along which a layer's weight is cut."""
    return 1 - dim if isinstance(module, Conv1D) else dim


def is_experts(module: nn.Module) -> bool:
    """Whether a module has its experts in parameters with one row for each, and knows of expert parallelism."""
    number = vars(module).get("num_experts", 0)
    own = [p for p in module._parameters.values() if p is not None]
    return (
        "_is_expert_parallel" in vars(module)
        and number > 1
        and any(p.dim() == 3 for p in own)
        and all(p.shape[0] == number for p in own)
    )


def likeness(layer: nn.Module) -> tuple:
    """Equal for layers that compute alike: classes, shapes, and numbers that modules keep, but for their place."""
    return tuple(
        (
            name,
            type(module),
            tuple((n, None if p is None else tuple(p.shape)) for n, p in module._parameters.items()),
            tuple(
                (n, value)
                for n, value in vars(module).items()
                if isinstance(value, int | float | str) and not re.search("idx|index|layer_id|layer_number", n)
            ),
        )
        for name, module in layer.named_modules()
    )


def in_features(linear: Any) -> int:
    if isinstance(linear, nn.Conv2d):
        return linear.in_channels
    return linear.nx if isinstance(linear, Conv1D) else linear.in_features


def out_features(linear: Any) -> int:
    if isinstance(linear, nn.Conv2d):
        return linear.out_channels
    return linear.nf if isinstance(linear, Conv1D) else linear.out_features


def narrowed(module: nn.Module, attributes: tuple[str, ...], share: float) -> dict[str, Any]:
    """Values of these attributes of a module where a share of its units is held."""
    result = {a: round(vars(module)[a] * share) for a in attributes if not a.startswith("config.")}
    of_config = [a.removeprefix("config.") for a in attributes if a.startswith("config.")]
    if of_config:
        config = module.config
        result["config"] = NarrowConfig(config, {a: round(getattr(config, a) * share) for a in of_config})
    return result
