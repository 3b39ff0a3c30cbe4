"""Simulation: N virtual workers in one process, one full copy of the parameters.

Micro-batch k of an accumulation window trains subnetwork k mod N; ``state.Cursor`` says when the next one begins. The
gradient of a slice with r holders is scaled by N/r, so that a window whose losses are averaged over N micro-batches
gives each slice the mean over its holders. It is the oracle the distributed engine is compared with, and a way to
repeat the paper's comparisons on one device with the plain Trainer (``gradient_accumulation_steps`` = a multiple of N).
"""

import functools
import itertools
from typing import Any, cast

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..families import Structure
from ..families.absent import Absent
from ..families.adapters import adapted_around
from ..families.kinds import EXPERTS
from ..families.layers import LINEAR, has_statistics, linear_dim, narrowed
from ..plan.plan import Plan
from ..plan.units import MaskableModule
from .arguments import virtual_arguments
from .backward_masking import mask_weight_gradients
from .experts import routed
from .held_ranges import HeldRanges, held_ranges
from .layers import COLUMN_WIDTHS, ROW_WIDTHS
from .mixin import mix_in
from .state import Cursor
from .statistics import simulate_statistics


class VirtualTensors(nn.Module):
    """Mixed into the class of a full module that computes, in training, with what the current subnetwork holds only.

    Attributes:
        dims: its tensors that are cut -> the dim; of a layer with adapters theirs too, and those of its base layer.
        held: of each of them, per subnetwork, the ranges along its dim.
        sizes: per subnetwork, values of its attributes, and those of its base layer and adapters.
        cursor: says which one is current.
    """

    dims: dict[str, int]
    held: dict[str, dict[int, HeldRanges]]
    sizes: dict[int, dict[str, Any]]
    cursor: Cursor

    def forward(self, *args, **kwargs):
        if not self.cursor.trains:
            return super().forward(*args, **kwargs)
        current = self.cursor.subnetwork
        full: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for name in (*self.dims, *self.sizes[current]):
                kept, last = _place(self, name)
                full.append((kept, last, kept[last]))
                if name in self.dims:
                    kept[last] = _put_together(kept[last], self.dims[name], self.held[name][current])
                else:
                    kept[last] = self.sizes[current][name]
            return super().forward(*args, **kwargs)
        finally:
            for kept, last, value in full:
                kept[last] = value


def _place(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """Where a tensor or an attribute is kept, and under which key."""
    owner, _, last = name.rpartition(".")
    of_owner = module.get_submodule(owner)
    return next(kept for kept in (of_owner._parameters, of_owner._buffers, vars(of_owner)) if last in kept), last


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


def simulate(
    model: nn.Module, plan: Plan, structure: Structure, cursor: Cursor, *, average_shared: bool
) -> list[RemovableHandle]:
    """Turn a full model into its simulation, in place; names and Parameters stay.

    ``average_shared``: as in ``SDPConfig.average_shared_statistics``.
    Returns: the hooks of parameters.
    """
    if plan.masking == "backward":
        mask_weight_gradients(model, plan, cursor, range(plan.num_subnetworks))
    elif plan.level == "neuron":
        _virtual_tensors(model, plan, cursor)
    else:
        _skip_blocks(model, plan, structure, cursor)
    simulate_statistics(model, plan, cursor, average_shared=average_shared)
    learn = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks = [parameter.register_hook(cursor.note_gradient) for parameter in learn]
    if plan.masking == "forward":
        for module in plan.modules:
            for name in module.dims:
                parameter = model.get_parameter(name)
                if not parameter.requires_grad:
                    continue
                scale = _scale(plan, name, parameter.dim())
                hooks.append(parameter.register_hook(functools.partial(_scaled, scale=scale)))
    return hooks


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
        units = {subnetwork: plan.held_units(module, subnetwork) for subnetwork in range(plan.num_subnetworks)}
        by_caller: dict[str, list[str]] = {}
        for owner in dict.fromkeys((*module.sizes, *module.by_owner)):
            # A layer with adapters reads their weights, and that of its base layer.
            by_caller.setdefault(adapted_around(model, owner) or owner, []).append(owner)
        for caller, owners in by_caller.items():
            own = model.get_submodule(caller)
            mix_in(own, VirtualExperts if module.of_kind is EXPERTS else VirtualTensors)
            virtual = cast(VirtualTensors, own)
            virtual.cursor = cursor
            names = [f"{owner}.{name}" for owner in owners for name in module.by_owner.get(owner, ())]
            virtual.dims = {name.removeprefix(f"{caller}."): module.dims[name] for name in names}
            virtual.held = {name: held[f"{caller}.{name}"] for name in virtual.dims}
            virtual.sizes = {subnetwork: {} for subnetwork in units}
            for owner, (subnetwork, held_units) in itertools.product(owners, units.items()):
                for attribute, value in _sizes(model.get_submodule(owner), module, owner, len(held_units)).items():
                    virtual.sizes[subnetwork][f"{owner}.{attribute}".removeprefix(f"{caller}.")] = value
            if isinstance(virtual, VirtualExperts):
                for sizes in virtual.sizes.values():
                    sizes["_is_expert_parallel"] = True
                virtual.experts = units


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
