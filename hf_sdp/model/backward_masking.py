"""Backward masking: the full forward, weight gradients of the held slices only.

A linear layer computes ``grad_weight`` for what the worker holds and saves only the inputs that takes; all other
entries of the gradient are zero. Gradients are averaged over the world and have to be the mean over the holders, so
each worker's share of a unit with r holders is scaled by N/r here: (1/N) Σ_i (N/r) g_ij = (1/r) Σ_{i holds j} g_ij.
Source: arXiv 2507.09029, section 3 (backward masking).
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..families.layers import is_linear, linear_dim
from ..plan.plan import Plan
from .autocast import autocast
from .held_blocks import mask_blocks
from .held_convolution import HeldConvolution, learns_by_channels
from .held_ranges import HeldRanges, held_gradient, held_ranges
from .mixin import mix_in
from .state import Cursor


class _HeldLinearFunction(torch.autograd.Function):
    """``x (..., in), weight (out, in) -> (..., out)``.

    Rows or columns of ``grad_weight`` outside ``ranges`` are zero.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, dim: int, ranges: HeldRanges, copy_inputs: bool):
        ctx.dim, ctx.ranges = dim, ranges
        ctx.has_bias = bias is not None
        if not ctx.needs_input_grad[1]:  # frozen
            ctx.save_for_backward(weight)
        elif dim == 0:
            ctx.save_for_backward(weight, x)
        else:
            inputs = (x[..., a:b] for a, b, _ in ranges)
            ctx.save_for_backward(weight, *((i.contiguous() for i in inputs) if copy_inputs else inputs))
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        weight, *inputs = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_output.matmul(weight)
        grad_2d = grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            for i, (a, b, scale) in enumerate(ctx.ranges):
                out = grad_weight.narrow(ctx.dim, a, b - a)
                if ctx.dim == 0:
                    torch.mm(grad_2d[:, a:b].t(), inputs[0].reshape(-1, inputs[0].shape[-1]), out=out)
                else:
                    out.copy_(grad_2d.t().mm(inputs[i].reshape(-1, b - a)))
                if scale != 1:
                    out.mul_(scale)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            # A bias along the cut dim is cut as well; that of a row-wise layer is shared by all workers.
            grad_bias = grad_2d.sum(0)
            if ctx.dim == 0:
                grad_bias = held_gradient(grad_bias, 0, ctx.ranges)
        return grad_x, grad_weight, grad_bias, None, None, None


class HeldLinear(nn.Module):
    """Mixed into the class of a full linear layer that learns only the slices its subnetwork holds.

    Attributes:
        dim: 0 for column-wise layers (rows of ``weight``), 1 for row-wise ones; of Conv1D's, of the transposed weight.
        held: per subnetwork, the ranges along ``dim``; never empty.
        copy_inputs: row-wise layers save copies of the held columns, so that the full input can be freed. Not after
            scaled_dot_product_attention: it saves its output anyway, views of it cost nothing.
    """

    dim: int
    held: dict[int, HeldRanges]
    cursor: Cursor
    copy_inputs: bool
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        ranges = self.held[self.cursor.subnetwork]
        x, weight, bias = autocast(x, self.weight, self.bias)
        if isinstance(self, Conv1D):
            weight = weight.t()
        return _HeldLinearFunction.apply(x, weight, bias, self.dim, ranges, self.copy_inputs)


class _HeldGradient(torch.autograd.Function):
    """The parameter itself; its gradient is scaled where it is held, and zero elsewhere."""

    @staticmethod
    def forward(ctx, parameter, dim: int, ranges: HeldRanges):
        ctx.dim, ctx.ranges = dim, ranges
        return parameter.view_as(parameter)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return held_gradient(grad, ctx.dim, ctx.ranges), None, None


class HeldTensors(nn.Module):
    """Mixed into the class of any other module with tensors that are cut (experts, an element for each head).

    Attributes:
        dims: names of its parameters that are cut -> the dim.
        held: of each of them, per subnetwork, the ranges along its dim; never empty.
    """

    dims: dict[str, int]
    held: dict[str, dict[int, HeldRanges]]
    cursor: Cursor

    def forward(self, *args, **kwargs):
        if not torch.is_grad_enabled():
            return super().forward(*args, **kwargs)
        parameters = {name: self.get_parameter(name) for name in self.dims}
        own: dict = self._parameters  # during the forward it has tensors that are no Parameters
        try:
            for name, p in parameters.items():
                own[name] = _HeldGradient.apply(p, self.dims[name], self.held[name][self.cursor.subnetwork])
            return super().forward(*args, **kwargs)
        finally:
            own.update(parameters)


def mask_weight_gradients(model: nn.Module, plan: Plan, cursor: Cursor, subnetworks: Iterable[int]) -> None:
    """Change the class of the layers of every maskable module, in place. Names, Parameters and hooks stay.

    ``subnetworks``: those that ``cursor`` may come to.
    """
    if plan.level == "block":
        return mask_blocks(model, plan, cursor, subnetworks)
    held = held_ranges(plan, subnetworks)
    for module_plan in plan.modules:
        for owner, dims in module_plan.by_owner.items():
            module = model.get_submodule(owner)
            if is_linear(module) and not isinstance(module, nn.Conv2d):
                mix_in(module, HeldLinear)
                linear = cast(HeldLinear, module)
                linear.dim, linear.held = linear_dim(module, dims["weight"]), held[f"{owner}.weight"]
                linear.cursor, linear.copy_inputs = cursor, not module_plan.of_kind.attends
            elif learns_by_channels(module):
                mix_in(module, HeldConvolution)
                convolution = cast(HeldConvolution, module)
                convolution.dim, convolution.held = dims["weight"], held[f"{owner}.weight"]
                convolution.cursor = cursor
            else:
                mix_in(module, HeldTensors)
                masked = cast(HeldTensors, module)
                masked.dims, masked.cursor = dims, cursor
                masked.held = {name: held[f"{owner}.{name}"] for name in dims}
