"""Simulation: N virtual workers in one process, one full copy of the parameters.

Micro-batch k of an accumulation window trains subnetwork k mod N; ``state.Cursor`` says when the next one begins. The
gradient of a slice with r holders is scaled by N/r, so that a window whose losses are averaged over N micro-batches
gives each slice the mean over its holders. It is the oracle the distributed engine is compared with, and a way to
repeat the paper's comparisons on one device with the plain Trainer (``gradient_accumulation_steps`` = a multiple of N).
"""

import functools
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from ..families import Structure
from ..families.absent import Absent
from ..plan.plan import Plan
from .backward_masking import HeldRanges, held_ranges, mask_weight_gradients
from .mixin import mix_in
from .state import Cursor


class VirtualLinear(nn.Linear):
    """A full linear layer that computes, in training, with the slices of the current subnetwork only."""

    dim: int
    held: dict[int, HeldRanges]
    cursor: Cursor

    @classmethod
    def take_place(cls, linear: nn.Module, *, dim: int, held: dict[int, HeldRanges], cursor: Cursor) -> None:
        """Turn a linear layer into one of these. It stays the same object, with its parameters and hooks."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.dim, linear.held, linear.cursor = dim, held, cursor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        ranges = self.held[self.cursor.subnetwork]

        def cut(t: torch.Tensor, dim: int) -> torch.Tensor:
            pieces = [t.narrow(dim, a, b - a) for a, b, _ in ranges]
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

        bias = cut(self.bias, 0) if self.bias is not None and self.dim == 0 else self.bias
        return F.linear(x, cut(self.weight, self.dim), bias)


class MaybeSkipped(nn.Module):
    """Mixed into the class of a block's module or norm: in training, absent where the subnetwork does not hold it."""

    holders: frozenset[int]
    cursor: Cursor
    skipped: nn.Module

    def forward(self, *args, **kwargs):
        if self.training and self.cursor.subnetwork not in self.holders:
            return self.skipped(*args, **kwargs)
        return super().forward(*args, **kwargs)


def simulate(model: nn.Module, plan: Plan, structure: Structure, cursor: Cursor) -> None:
    """Turn a full model into its simulation, in place; names and Parameters stay."""
    if plan.masking == "backward":
        mask_weight_gradients(model, plan, cursor, range(plan.num_subnetworks))
    elif plan.level == "neuron":
        _virtual_linears(model, plan, cursor)
    else:
        _skip_blocks(model, plan, structure, cursor)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_hook(cursor.note_gradient)
    if plan.masking == "forward":
        for module in plan.modules:
            for name in module.dims:
                parameter = model.get_parameter(name)
                if not parameter.requires_grad:
                    continue
                parameter.register_hook(functools.partial(_scaled, scale=_scale(plan, name, parameter.dim())))


def _scaled(grad: torch.Tensor, scale: float | torch.Tensor) -> torch.Tensor:
    return grad * (scale.to(grad) if isinstance(scale, torch.Tensor) else scale)


def _scale(plan: Plan, name: str, num_dims: int) -> float | torch.Tensor:
    """N/r of every slice: one number, or a tensor that broadcasts against the parameter."""
    slices = plan.slices[name]
    scales = [plan.gradient_scale(s.holders) for s in slices]
    if len(set(scales)) == 1:
        return scales[0]
    sizes = torch.tensor([s.stop - s.start for s in slices])
    shape = [-1 if dim == slices[0].dim else 1 for dim in range(num_dims)]
    return torch.tensor(scales).repeat_interleave(sizes).view(shape)


def _virtual_linears(model: nn.Module, plan: Plan, cursor: Cursor) -> None:
    held = held_ranges(plan, range(plan.num_subnetworks))
    for module in plan.modules:
        for name, dim in module.dims.items():
            owner, _, kind = name.rpartition(".")
            if kind == "weight":
                VirtualLinear.take_place(model.get_submodule(owner), dim=dim, held=held[name], cursor=cursor)


def _skip_blocks(model: nn.Module, plan: Plan, structure: Structure, cursor: Cursor) -> None:
    for module in plan.modules:
        holders = frozenset(plan.unit_holders[module.name][0])
        for name in module.members:
            own = model.get_submodule(name)
            # Not a child: names of the host's model stay.
            object.__setattr__(own, "skipped", Absent(type(own), structure.absent[name]))
            mix_in(own, MaybeSkipped)
            mixed = cast(MaybeSkipped, own)
            mixed.holders, mixed.cursor = holders, cursor
