"""Products of experts with their tokens, on the meta device.

How many tokens an expert has is not known there. What is computed, allocated and saved depends on their sum alone.
"""

import contextlib
from collections.abc import Iterator

import torch
from transformers.integrations import moe


class _GroupedProduct(torch.autograd.Function):
    """``x (tokens, in), weights (experts, in, out) -> (tokens, out)``, as torch's kernels of all data types save and
    allocate it."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weights, offs)
        return x @ weights[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: torch.Tensor):
        x, weights, _ = ctx.saved_tensors
        grad_weights = None
        if ctx.needs_input_grad[1]:  # not frozen
            grad_weights = torch.empty_like(weights)
            torch.mm(x.t(), grad, out=grad_weights[0])
        return grad @ weights[0].t(), grad_weights, None


def _product(x: torch.Tensor, weights: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
    return _GroupedProduct.apply(x.to(weights.dtype), weights, offs)


@contextlib.contextmanager
def grouped_products_on_meta() -> Iterator[None]:
    """Within, transformers' experts compute on the meta device in any dtype."""
    original = moe._grouped_mm
    moe._grouped_mm = _product
    try:
        yield
    finally:
        moe._grouped_mm = original
