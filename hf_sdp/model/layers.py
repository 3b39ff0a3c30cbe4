"""Narrow modules: what a worker holds in part computes as the full module does, on smaller tensors."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from ..plan.plan import Part
from ..plan.region import Region
from .mixin import mix_in


class SharedBias(nn.Module):
    """The bias of a row-wise layer. All workers hold it, while the layer's weight is cut: hence a module of its own."""

    def __init__(self, bias: nn.Parameter):
        super().__init__()
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias


class RowwiseLinear(nn.Linear):
    """Mixed into the class of a row-wise linear layer whose slice is held: it also adds the shared bias."""

    shared_bias: SharedBias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = F.linear(x, self.weight, self.bias)
        return self.shared_bias(output) if self.bias is None else output  # the full layer has its own


def copy_for_part(module: nn.Module, part: Part) -> nn.Module:
    """A copy of ``module`` that shares with it all but the modules whose tensors are cut."""
    copied = _shallow_copy(module)
    for owner in _by_owner(part):
        parent = copied
        for name in filter(None, owner.split(".")):
            parent._modules[name] = parent = _shallow_copy(parent.get_submodule(name))
    vars(copied).pop("forward", None)  # one that was set on the instance is bound to it: the sum of parts sets it
    return copied


def _shallow_copy(module: nn.Module) -> nn.Module:
    copied = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, (dict, set)):  # children, parameters, hooks: a hook of one part is not one of the others
            object.__setattr__(copied, name, copy.copy(value))
    return copied


def narrow(module: nn.Module, part: Part, *, adds_bias: bool) -> None:
    """Cut the tensors of ``module`` to the regions of ``part``, in place; its forward runs unchanged.

    Linear layers get their true ``in_features`` and ``out_features``.

    Args:
        module: a module with its full tensors; those that are cut are its own or of modules below it.
        adds_bias: whether this part adds the shared biases of row-wise layers; False when a sum of parts does.
    """
    for child, regions in _by_owner(part).items():
        owner = module.get_submodule(child)
        if isinstance(owner, nn.Linear):
            _narrow_linear(owner, regions, adds_bias)
        else:
            for name, region in regions.items():
                if name in owner._parameters:
                    owner._parameters[name] = _narrow_parameter(owner.get_parameter(name), region)
                else:
                    owner._buffers[name] = region.of(owner.get_buffer(name))


def _by_owner(part: Part) -> dict[str, dict[str, Region]]:
    """Name of each module with tensors that are cut, relative to the maskable module -> its tensors' regions."""
    result: dict[str, dict[str, Region]] = {}
    for full, region in part.regions.items():
        child, _, name = full.removeprefix(part.module.name + ".").rpartition(".")
        result.setdefault(child, {})[name] = region
    return result


def _narrow_parameter(parameter: torch.Tensor, region: Region) -> nn.Parameter:
    """A new parameter with the region's values of the full one, in memory of its own."""
    return nn.Parameter(region.of(parameter.detach()), requires_grad=parameter.requires_grad)


def _narrow_linear(linear: nn.Linear, regions: dict[str, Region], adds_bias: bool) -> None:
    own, bias = linear._parameters, linear.bias
    weight = _narrow_parameter(linear.weight, regions["weight"])
    linear.out_features, linear.in_features = weight.shape
    own["weight"] = weight
    own["bias"] = _narrow_parameter(bias, regions["bias"]) if "bias" in regions else None
    if bias is not None and "bias" not in regions and adds_bias:
        mix_in(linear, RowwiseLinear)
        linear.add_module("shared_bias", SharedBias(bias))
