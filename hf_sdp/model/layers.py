"""Narrow modules: what a worker holds in part computes as the full module does, on smaller tensors.

A linear layer that is held in several parts is one layer for the module around it: a column-wise one puts the outputs
of its parts side by side, a row-wise one adds them up. So do convolutions, along the dim of channels. The module around
it computes once, with all that is held.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..families.layers import channel_dim, has_statistics, is_experts, is_linear, linear_dim
from ..plan.region import Region
from .mixin import mix_in
from .statistics import hold_statistics

ROW_WIDTHS, COLUMN_WIDTHS = ("in_features", "nx", "in_channels"), ("out_features", "nf", "out_channels")
"""Attributes of linear layers: sizes of their inputs and outputs."""
WIDTHS = (*ROW_WIDTHS, *COLUMN_WIDTHS, "num_features")
"""The same, and of batch norms."""


def _multiply(layer: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if isinstance(layer, nn.Conv2d):
        return layer._conv_forward(x, weight, bias)
    return F.linear(x, weight.t() if isinstance(layer, Conv1D) else weight, bias)


class SharedBias(nn.Module):
    """The bias of a row-wise layer. All workers hold it, while the layer's weight is cut: hence a module of its own.

    ``of_channels``: it is added to dim 1, as that of a convolution.
    """

    def __init__(self, bias: nn.Parameter, of_channels: bool):
        super().__init__()
        self.bias, self.of_channels = bias, of_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.bias.view(-1, 1, 1) if self.of_channels else self.bias)


class TensorsOfPart(nn.Module):
    """What a part has of the tensors of one module. Called for the parameter or buffer of that name, or with a linear
    layer and its input, to multiply as it does."""

    def __init__(self, tensors: dict[str, nn.Parameter | torch.Tensor]):
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)

    def forward(self, asked: nn.Module | str, x: torch.Tensor | None = None) -> torch.Tensor:
        if isinstance(asked, str):
            return getattr(self, asked)
        assert x is not None
        return _multiply(asked, x, self.get_parameter("weight"), getattr(self, "bias", None))


def _side_by_side(tensors: Iterable[torch.Tensor], dim: int, sizes: list[list[int]]) -> torch.Tensor:
    """What parts have, in the order in which a module with all of it has it.

    ``sizes``: how much of each part belongs to each range of a fused projection.
    """
    tensors = list(tensors)
    if len(sizes[0]) > 1:
        by_part = [tensor.split(of_part, dim) for tensor, of_part in zip(tensors, sizes, strict=True)]
        tensors = [pieces[number] for number in range(len(sizes[0])) for pieces in by_part]
    return torch.cat(tensors, dim)


class HeldColumns(nn.Module):
    """Mixed into the class of a column-wise linear layer that is held in several parts.

    Adapters read its weight and bias without calling it. They are gathered then: the layer has been called.

    Attributes:
        parts: ``TensorsOfPart`` each.
        sdp_sizes_of_ranges: how many outputs of each part belong to each range of a fused projection.
    """

    parts: nn.ModuleList
    sdp_sizes_of_ranges: list[list[int]]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._parameters["weight"] is not None:  # the full layer
            return super().forward(x)
        return _side_by_side((part(self, x) for part in self.parts), channel_dim(self), self.sdp_sizes_of_ranges)

    @property
    def weight(self) -> torch.Tensor:
        own = self._parameters["weight"]
        return self._of_parts("weight", linear_dim(self, 0)) if own is None else own

    @property
    def bias(self) -> torch.Tensor | None:
        own = self._parameters["bias"]
        return self._of_parts("bias", 0) if own is None and "bias" in self.parts[0]._parameters else own

    def _of_parts(self, name: str, dim: int) -> torch.Tensor:
        return _side_by_side((part.get_parameter(name) for part in self.parts), dim, self.sdp_sizes_of_ranges)


class HeldRows(nn.Module):
    """Mixed into the class of a row-wise linear layer of which some is held.

    Attributes:
        parts: ``TensorsOfPart`` each, if it has parts. They are added in sorted order of their holder sets.
        shared_bias: comes after all parts, if there is one. In one of the parts it would break the global order of
            communication: all workers gather it, and the first part of one worker is the second of another.
    """

    parts: nn.ModuleList | None
    shared_bias: SharedBias | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight, bias = self._parameters["weight"], self._parameters["bias"]
        if bias is not None or (weight is not None and self._modules.get("shared_bias") is None):
            return super().forward(x)  # the full layer
        parts = self._modules.get("parts")
        if weight is not None:
            output = _multiply(self, x, weight, None)
        else:
            assert isinstance(parts, nn.ModuleList)
            sizes = [part.get_parameter("weight").shape[linear_dim(self, 1)] for part in parts]
            pieces = x.split(sizes, channel_dim(self))
            outputs = (part(self, piece) for part, piece in zip(parts, pieces, strict=True))
            output = functools.reduce(torch.add, outputs)
        shared_bias = self._modules.get("shared_bias")
        return output if shared_bias is None else shared_bias(output)

    @property
    def weight(self) -> torch.Tensor:
        own, parts = self._parameters["weight"], self._modules.get("parts")
        if own is not None:
            return own
        assert isinstance(parts, nn.ModuleList)
        return torch.cat([part.get_parameter("weight") for part in parts], linear_dim(self, 1))

    @property
    def bias(self) -> torch.Tensor | None:
        shared_bias = self._modules.get("shared_bias")
        own = self._parameters["bias"]
        return shared_bias.get_parameter("bias") if own is None and shared_bias is not None else own


class HeldInParts(nn.Module):
    """Mixed into the class of any other module of which several parts are held: its tensors are put together.

    Attributes:
        parts: ``TensorsOfPart`` each.
        sdp_dims: tensor -> dim along which it is cut.
        sdp_sizes: tensor -> how much of each part belongs to each of its ranges.
    """

    parts: nn.ModuleList
    sdp_dims: dict[str, int]
    sdp_sizes: dict[str, list[list[int]]]

    def forward(self, *args, **kwargs):
        if not all(self._own(name).get(name) is None for name in self.sdp_dims):  # the full module
            return super().forward(*args, **kwargs)
        try:
            for name, dim in self.sdp_dims.items():
                of_parts = (part(name) for part in self.parts)
                self._own(name)[name] = _side_by_side(of_parts, dim, self.sdp_sizes[name])
            return super().forward(*args, **kwargs)
        finally:
            for name in self.sdp_dims:
                self._own(name)[name] = None

    def _own(self, name: str) -> dict:
        return self._parameters if name in self._parameters else self._buffers


def narrow(owner: nn.Module, regions: Sequence[dict[str, Region]], dims: dict[str, int], *, has_parts: bool) -> None:
    """Cut the tensors of a module itself, not of those within it, to what is held of them, in place.

    Args:
        owner: with its full tensors. Its ``in_features`` and the like become those of what is held.
        regions: for each part that is held: name of the parameter or buffer -> what it has of it.
        dims: name -> dim along which it is cut.
        has_parts: whether each part has a module of its own; else there is one part.
    """
    multiplies, has_experts = is_linear(owner), is_experts(owner)
    bias = owner._parameters.get("bias") if multiplies else None
    if not has_parts:
        held = {name: _cut(owner, name, region) for name, region in regions[0].items()}
        for name, tensor in held.items():
            tensors: dict = owner._parameters if name in owner._parameters else owner._buffers
            tensors[name] = tensor
    else:
        parts = [{name: _cut(owner, name, region) for name, region in of_part.items()} for of_part in regions]
        for name in dims:
            tensors = owner._parameters if name in owner._parameters else owner._buffers
            tensors[name] = None
        owner.add_module("parts", nn.ModuleList(map(TensorsOfPart, parts)))
    if not multiplies:
        if has_parts and not has_experts:
            mix_in(owner, HeldInParts)
            vars(owner)["sdp_dims"] = dims
            vars(owner)["sdp_sizes"] = {name: _sizes_of_ranges(regions, name, dim) for name, dim in dims.items()}
        if has_statistics(owner) and "weight" in dims:
            hold_statistics(owner, [one for region in regions for one in region["weight"].ranges[0]])
        return
    width = sum(region["weight"].shape[dims["weight"]] for region in regions)
    is_rows = linear_dim(owner, dims["weight"]) == 1
    for name in ROW_WIDTHS if is_rows else COLUMN_WIDTHS:
        if name in vars(owner):
            setattr(owner, name, width)
    if is_rows:
        if bias is not None:
            owner._parameters["bias"] = None
            owner.add_module("shared_bias", SharedBias(bias, channel_dim(owner) == 1))
        if bias is not None or has_parts:
            mix_in(owner, HeldRows)
    elif has_parts:
        mix_in(owner, HeldColumns)
        vars(owner)["sdp_sizes_of_ranges"] = _sizes_of_ranges(regions, "weight", dims["weight"])


def _sizes_of_ranges(regions: Sequence[dict[str, Region]], name: str, dim: int) -> list[list[int]]:
    return [[stop - start for start, stop in region[name].ranges[dim]] for region in regions]


def _cut(owner: nn.Module, name: str, region: Region) -> nn.Parameter | torch.Tensor:
    """A new tensor with the region's values of the full one, in memory of its own."""
    if name in owner._buffers:
        return region.of(owner.get_buffer(name))
    parameter = owner.get_parameter(name)
    return nn.Parameter(region.of(parameter.detach()), requires_grad=parameter.requires_grad)
