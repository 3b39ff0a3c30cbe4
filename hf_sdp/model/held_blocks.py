"""Backward masking at block level: a block that is not held computes, and learns nothing.

All parameters of a block are exchanged for the time of its forward: hosts read the weights of some modules without
calling them.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..plan.plan import Plan
from .mixin import mix_in
from .state import Cursor


class _ZeroGradients(torch.autograd.Function):
    """Passes ``output`` on, and gives the parameters zero gradients: every worker must reduce every parameter."""

    @staticmethod
    def forward(ctx, output, *parameters):
        ctx.shapes = [(p.shape, p.dtype, p.device) for p in parameters]
        return output.clone()  # not a view: hosts add to it in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        zeros = [torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.shapes]
        return grad_output, *zeros


class ScaledGradient(torch.autograd.Function):
    """The parameter itself; its gradient is multiplied by ``scale``."""

    @staticmethod
    def forward(ctx, parameter, scale: float):
        ctx.scale = scale
        return parameter.view_as(parameter)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * ctx.scale, None


class HeldBlock(nn.Module):
    """Mixed into the class of a module of a block: where it is not held, its parameters get zero gradients and nothing
    is saved for them.

    Attributes:
        scales: subnetwork -> N/r, for those that hold it.
    """

    scales: dict[int, float]
    cursor: Cursor

    def forward(self, *args, **kwargs):
        scale = self.scales.get(self.cursor.subnetwork)
        if not torch.is_grad_enabled() or scale == 1:
            return super().forward(*args, **kwargs)
        if scale is not None:
            with exchanged(self, lambda p: ScaledGradient.apply(p, scale)):
                return super().forward(*args, **kwargs)
        parameters = [p for p in self.parameters() if p.requires_grad]
        with exchanged(self, torch.Tensor.detach):
            output = super().forward(*args, **kwargs)
        return _with_zero_gradients(output, parameters)


@contextlib.contextmanager
def exchanged(module: nn.Module, other: Callable[[nn.Parameter], torch.Tensor]) -> Iterator[None]:
    """``other`` of each parameter that learns, in its place."""
    changed: list[tuple[dict[str, Any], str, nn.Parameter]] = []
    try:
        for owner in module.modules():
            own: dict = owner._parameters  # during the forward it has tensors that are no Parameters
            for name, p in own.items():
                if p is not None and p.requires_grad:
                    changed.append((own, name, p))
                    own[name] = other(p)
        yield
    finally:
        for own, name, p in changed:
            own[name] = p


def _with_zero_gradients(output, parameters: list[nn.Parameter]):
    leaves, form = tree_flatten(output)
    first = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)), None)
    if first is not None and parameters:
        leaves[first] = _ZeroGradients.apply(leaves[first], *parameters)
    return tree_unflatten(leaves, form)


def mask_blocks(model: nn.Module, plan: Plan, cursor: Cursor, subnetworks: Iterable[int]) -> None:
    """Change the class of the modules of every block, in place. Names, Parameters and hooks stay.

    ``subnetworks``: those that ``cursor`` may come to.
    """
    subnetworks = tuple(subnetworks)
    for module_plan in plan.modules:
        (holders,) = plan.unit_holders[module_plan.name]
        for name in module_plan.members:
            module = model.get_submodule(name)
            mix_in(module, HeldBlock)
            masked = cast(HeldBlock, module)
            masked.scales = {index: plan.gradient_scale(holders) for index in subnetworks if index in holders}
            masked.cursor = cursor
