"""Simulation: N virtual workers in one process, one full copy of the parameters.

Micro-batch k of an accumulation window trains subnetwork k mod N; ``state.Cursor`` says when the next one begins. The
gradient of a slice with r holders is scaled by N/r, so that a window whose losses are averaged over N micro-batches
gives each slice the mean over its holders. It is the oracle the distributed engine is compared with, and a way to
repeat the paper's comparisons on one device with the plain Trainer (``gradient_accumulation_steps`` = a multiple of N).
"""

import functools
from typing import Any, cast

import torch
from torch import nn

from ..families import Structure
from ..families.absent import Absent
from ..families.kinds import EXPERTS
from ..families.layers import LINEAR, has_statistics, narrowed
from ..plan.plan import Plan
from ..plan.units import MaskableModule
from .arguments import virtual_arguments
from .backward_masking import HeldRanges, held_ranges, mask_weight_gradients
from .experts import routed
from .layers import COLUMN_WIDTHS, ROW_WIDTHS, linear_dim
from .mixin import mix_in
from .state import Cursor
from .statistics import simulate_statistics


class VirtualTensors(nn.Module):
    """Mixed into the class of a full module that computes, in training, with what the current subnetwork holds only.

    Attributes:
        dims: its tensors that are cut -> the dim.
        held: of each of them, per subnetwork, the ranges along its dim.
        sizes: per subnetwork, values of attributes.
        cursor: says which one is current.
    """

    dims: dict[str, int]
    held: dict[str, dict[int, HeldRanges]]
    sizes: dict[int, dict[str, Any]]
    cursor: Cursor

    def forward(self, *args, **kwargs):
        if not self.cursor.trains:
            return super().forward(*args, **kwargs)
        current, own = self.cursor.subnetwork, vars(self)
        tensors: list[dict] = [self._parameters if name in self._parameters else self._buffers for name in self.dims]
        full = [of_kind[name] for of_kind, name in zip(tensors, self.dims, strict=True)]
        attributes = {name: own[name] for name in self.sizes.get(current, ())}
        try:
            for of_kind, (name, dim) in zip(tensors, self.dims.items(), strict=True):
                of_kind[name] = _put_together(of_kind[name], dim, self.held[name][current])
            own.update(self.sizes.get(current, {}))
            return super().forward(*args, **kwargs)
        finally:
            own.update(attributes)
            for of_kind, name, tensor in zip(tensors, self.dims, full, strict=True):
                of_kind[name] = tensor


class VirtualExperts(VirtualTensors):
    """The same of experts. ``experts``: per subnetwork the numbers of those that are held."""

    experts: dict[int, list[int]]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        if self.cursor.trains:
            held, num_experts = self.experts[self.cursor.subnetwork], vars(self)["num_experts"]
            top_k_index, top_k_weights = routed(held, num_experts, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)


def _put_together(tensor: torch.Tensor, dim: int, ranges: HeldRanges) -> torch.Tensor:
    pieces = [tensor.narrow(dim, start, stop - start) for start, stop, _ in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


class MaybeSkipped(nn.Module):
    """Mixed into the class of a block's module or norm: in training, absent where the subnetwork does not hold it."""

    holders: frozenset[int]
    cursor: Cursor
    skipped: nn.Module

    def forward(self, *args, **kwargs):
        if self.cursor.trains and self.cursor.subnetwork not in self.holders:
            return self.skipped(*args, **kwargs)
        return super().forward(*args, **kwargs)


def simulate(model: nn.Module, plan: Plan, structure: Structure, cursor: Cursor, *, average_shared: bool) -> None:
    """Turn a full model into its simulation, in place; names and Parameters stay.

    ``average_shared``: as in ``SDPConfig.average_shared_statistics``.
    """
    if plan.masking == "backward":
        mask_weight_gradients(model, plan, cursor, range(plan.num_subnetworks))
    elif plan.level == "neuron":
        _virtual_tensors(model, plan, cursor)
    else:
        _skip_blocks(model, plan, structure, cursor)
    simulate_statistics(model, plan, cursor, average_shared=average_shared)
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


def _virtual_tensors(model: nn.Module, plan: Plan, cursor: Cursor) -> None:
    held = held_ranges(plan, range(plan.num_subnetworks))
    for module in plan.modules:
        virtual_arguments(model, plan, module, cursor)
        without_tensors: dict[str, dict[str, int]] = {name: {} for name in module.sizes}
        for owner, dims in (without_tensors | module.by_owner).items():
            own = model.get_submodule(owner)
            mix_in(own, VirtualExperts if module.of_kind is EXPERTS else VirtualTensors)
            virtual = cast(VirtualTensors, own)
            virtual.dims, virtual.cursor = dims, cursor
            virtual.held = {name: held[f"{owner}.{name}"] for name in dims}
            virtual.sizes = {
                subnetwork: _sizes(own, module, owner, plan.held_units(module, subnetwork))
                for subnetwork in range(plan.num_subnetworks)
            }
            if isinstance(virtual, VirtualExperts):
                for sizes in virtual.sizes.values():
                    sizes["_is_expert_parallel"] = True
                some = next(iter(virtual.held.values()))
                virtual.experts = {
                    subnetwork: [expert for start, stop, _ in ranges for expert in range(start, stop)]
                    for subnetwork, ranges in some.items()
                }


def _sizes(own: nn.Module, module: MaskableModule, name: str, units: int) -> dict[str, Any]:
    """Attributes of a module where some units are held."""
    share = units / module.num_units
    result = narrowed(own, module.sizes.get(name, ()), share)
    if isinstance(own, LINEAR):
        is_rows = linear_dim(own, module.dims[f"{name}.weight"]) == 1
        of_width = ROW_WIDTHS if is_rows else COLUMN_WIDTHS
        result |= {attribute: round(vars(own)[attribute] * share) for attribute in of_width if attribute in vars(own)}
    if has_statistics(own):
        result["num_features"] = round(vars(own)["num_features"] * share)
    return result


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
