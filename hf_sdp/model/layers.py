"""The modules that take the place of what a worker holds in part."""

import copy
import functools

import torch
import torch.nn.functional as F
from torch import nn

from ..plan.plan import Part
from ..plan.region import Region
from ..plan.units import MaskableModule


class SharedBias(nn.Module):
    """The bias of a row-wise layer. All workers hold it, while the layer's weight is cut: hence a module of its own."""

    def __init__(self, bias: nn.Parameter):
        super().__init__()
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.bias


class RowwiseLinear(nn.Linear):
    """A slice of a row-wise linear layer that also adds the shared bias."""

    shared_bias: SharedBias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared_bias(F.linear(x, self.weight))


def narrow_module(module: nn.Module, part: Part, *, adds_bias: bool) -> nn.Module:
    """``module`` with its tensors cut to the regions of ``part``; its forward runs unchanged.

    Args:
        module: a module of the full model; it is not changed. The tensors that are cut are its own or its children's.
        adds_bias: whether this part adds the shared biases of row-wise layers; False when a PartSum does.
    Returns: a shallow copy with new linear layers, true ``in_features``/``out_features`` and the same child names.
    """
    narrowed = _shallow_copy(module)
    by_owner: dict[str, dict[str, Region]] = {}
    for full, region in part.regions.items():
        child, _, name = full.removeprefix(part.module.name + ".").rpartition(".")
        by_owner.setdefault(child, {})[name] = region
    for child, regions in by_owner.items():
        owner = module.get_submodule(child)
        if isinstance(owner, nn.Linear):
            narrowed._modules[child] = _narrow_linear(owner, regions, adds_bias)
        else:
            copied = narrowed if owner is module else _shallow_copy(owner)
            _narrow_tensors(copied, regions)
            if copied is not narrowed:
                narrowed._modules[child] = copied
    return narrowed


def _shallow_copy(module: nn.Module) -> nn.Module:
    copied = copy.copy(module)
    for name, value in vars(module).items():
        if isinstance(value, (dict, set)):  # children, parameters, hooks: a hook of one part is not one of the others
            object.__setattr__(copied, name, copy.copy(value))
    return copied


def _narrow_tensors(module: nn.Module, regions: dict[str, Region]) -> None:
    """Cut parameters and buffers of the module itself, in place."""
    for name, region in regions.items():
        if name in module._parameters:
            module._parameters[name] = _narrow_parameter(module.get_parameter(name), region)
        else:
            module._buffers[name] = region.of(module.get_buffer(name))


def _narrow_parameter(parameter: torch.Tensor, region: Region) -> nn.Parameter:
    """A new parameter with the region's values of the full one, in memory of its own."""
    return nn.Parameter(region.of(parameter.detach()), requires_grad=parameter.requires_grad)


def _narrow_linear(linear: nn.Linear, regions: dict[str, Region], adds_bias: bool) -> nn.Module:
    adds_shared_bias = linear.bias is not None and "bias" not in regions and adds_bias
    weight = _narrow_parameter(linear.weight, regions["weight"])
    narrowed = _shallow_copy(linear)  # with the hooks that it has
    assert isinstance(narrowed, nn.Linear)
    narrowed.out_features, narrowed.in_features = weight.shape
    own = narrowed._parameters
    own["weight"] = weight
    own["bias"] = _narrow_parameter(linear.bias, regions["bias"]) if "bias" in regions else None
    if adds_shared_bias:
        narrowed.__class__ = RowwiseLinear
        narrowed.add_module("shared_bias", SharedBias(linear.bias))
    return narrowed


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


def absent(module: MaskableModule) -> dict[str, nn.Module]:
    """Name of each module of a block -> what a worker that does not hold the block has in its place."""
    kind = module.of_kind
    return {name: kind.absent() if name == module.name else nn.Identity() for name in module.members}
