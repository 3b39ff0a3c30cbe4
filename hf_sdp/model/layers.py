"""The modules that take the place of what a worker does not hold, or holds in several parts."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

from ..plan.plan import Part


def narrow_parameter(parameter: nn.Parameter, dim: int, start: int, stop: int) -> nn.Parameter:
    """A new parameter with the values ``start:stop`` along ``dim`` and memory of its own."""
    values = parameter.detach().narrow(dim, start, stop - start).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(values, requires_grad=parameter.requires_grad)


class SharedBias(nn.Module):
    """The bias of a row-wise layer: held by all workers while the layer's weight is not, hence a module of its own."""

    def __init__(self, bias: nn.Parameter):
        super().__init__()
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias


class RowwiseLinear(nn.Linear):
    """A slice of a row-wise linear layer that also adds the shared bias."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared_bias(F.linear(x, self.weight))


def narrow_module(module: nn.Module, part: Part, *, adds_bias: bool) -> nn.Module:
    """``module`` with its linear layers cut to the ranges of ``part``; its forward runs unchanged.

    Args:
        module: a module of the full model; it is not changed.
        adds_bias: whether this part adds the shared biases of row-wise layers; False when a PartSum does.
    Returns: a shallow copy with new linear layers, true ``in_features``/``out_features`` and the same child names.
    """
    narrowed = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, (dict, set)):  # children, parameters, hooks: a hook of one part is not one of the others
            object.__setattr__(narrowed, name, copy.copy(value))
    for child, linear in module.named_children():
        cut = part.ranges.get(f"{part.module}.{child}.weight")
        if cut is not None:
            bias_cut = part.ranges.get(f"{part.module}.{child}.bias")
            narrowed._modules[child] = _narrow_linear(linear, cut, bias_cut, adds_bias)
    return narrowed


def _narrow_linear(linear: nn.Linear, cut, bias_cut, adds_bias: bool) -> nn.Linear:
    shared_bias = linear.bias is not None and bias_cut is None and adds_bias
    weight = narrow_parameter(linear.weight, *cut)
    narrowed = (RowwiseLinear if shared_bias else nn.Linear)(
        weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype
    )
    narrowed.weight = weight
    if bias_cut is not None and linear.bias is not None:
        narrowed.bias = narrow_parameter(linear.bias, *bias_cut)
    if shared_bias:
        narrowed.shared_bias = SharedBias(linear.bias)
    return narrowed.train(linear.training)


class PartSum(nn.Module):
    """A module held in several parts: the sum over narrow copies of it, in sorted order of their holder sets.

    Biases of row-wise layers come after all parts. In one of the parts they would break the global order of
    communication: they are gathered by all workers, and the first part of one worker is the second of another.
    Attention returns ``(output, weights)``; the weights of a subnetwork's heads are not put together.
    """

    def __init__(self, parts: list[nn.Module], biases: dict[str, nn.Parameter]):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.shared_biases = nn.ModuleDict({child: SharedBias(bias) for child, bias in biases.items()})

    def forward(self, *args, **kwargs):
        outputs = [part(*args, **kwargs) for part in self.parts]
        returns_tuple = isinstance(outputs[0], tuple)
        total = functools.reduce(torch.add, (output[0] for output in outputs) if returns_tuple else outputs)
        for bias in self.shared_biases.values():
            total = bias(total)
        return (total, None) if returns_tuple else total


class SkippedAttention(nn.Module):
    """An attention block that is not held: contributes nothing to the residual stream, caches nothing."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        return hidden_states.new_zeros(()), None


class SkippedMLP(nn.Module):
    """An MLP block that is not held: contributes nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        return hidden_states.new_zeros(())


class SkippedLayer(nn.Module):
    """A decoder layer that is not held: the residual stream passes through."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        return hidden_states


SKIPPED = {"attention": SkippedAttention, "mlp": SkippedMLP, "layer": SkippedLayer}
