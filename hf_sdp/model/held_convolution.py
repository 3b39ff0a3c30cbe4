"""Backward masking of convolutions: the full forward, weight gradients of the held channels only.

As ``backward_masking.HeldLinear``. For the input channels of a convolution only those that are held are saved.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.grad import conv2d_input, conv2d_weight

from .autocast import autocast
from .held_ranges import HeldRanges, held_gradient
from .state import Cursor


class _HeldConvolution(torch.autograd.Function):
    """``x (batch, in, height, width), weight (out, in, ...) -> (batch, out, ...)``. ``options``: stride, padding and
    dilation. Rows or columns of ``grad_weight`` outside of ``ranges`` are zero."""

    @staticmethod
    def forward(ctx, x, weight, bias, dim: int, ranges: HeldRanges, options: tuple):
        ctx.dim, ctx.ranges, ctx.options, ctx.shape = dim, ranges, options, x.shape
        if not ctx.needs_input_grad[1]:  # frozen
            inputs: tuple[Any, ...] = ()
        elif dim == 0:
            inputs = (x,)
        else:
            inputs = tuple(x[:, start:stop].contiguous() for start, stop, _ in ranges)
        ctx.save_for_backward(weight, *inputs)
        return F.conv2d(x, weight, bias, *options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        weight, *inputs = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = conv2d_input(ctx.shape, weight, grad_output, *ctx.options)
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight)
            for number, (start, stop, scale) in enumerate(ctx.ranges):
                held = grad_weight.narrow(ctx.dim, start, stop - start)
                x, of_output = (
                    (inputs[0], grad_output[:, start:stop]) if ctx.dim == 0 else (inputs[number], grad_output)
                )
                torch.mul(conv2d_weight(x, held.shape, of_output, *ctx.options), scale, out=held)
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum((0, 2, 3))
            if ctx.dim == 0:  # it is cut as well; that of a row-wise layer is shared by all workers
                grad_bias = held_gradient(grad_bias, 0, ctx.ranges)
        return grad_x, grad_weight, grad_bias, None, None, None


class HeldConvolution(nn.Module):
    """Mixed into the class of a full convolution that learns only the channels that its subnetwork holds.

    Attributes:
        dim: 0 for output channels, 1 for input channels.
        held: per subnetwork, the ranges along ``dim``; never empty.
    """

    dim: int
    held: dict[int, HeldRanges]
    cursor: Cursor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        own: Any = self
        x, weight, bias = autocast(x, own.weight, own.bias)
        options = own.stride, own.padding, own.dilation
        return _HeldConvolution.apply(x, weight, bias, self.dim, self.held[self.cursor.subnetwork], options)


def learns_by_channels(module: nn.Module) -> bool:
    """Whether it can be a :class:`HeldConvolution`: one group, and zeros around the image."""
    return (
        type(module) is nn.Conv2d
        and module.groups == 1
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )
