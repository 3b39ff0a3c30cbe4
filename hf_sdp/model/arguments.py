"""What is given to a module for each of its heads is cut as the heads are, where the module begins.

A model may make position biases once for all layers (T5, MPT). Layers hold different heads, so that each takes its own.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..families.arguments import of_held_heads
from ..families.base import OfHeads
from ..plan.plan import Plan
from ..plan.subnetwork import LocalModule
from ..plan.units import MaskableModule
from .mixin import mix_in
from .state import Cursor, Run


class HeldArguments(nn.Module):
    """Mixed into the class of a module with such arguments. What it passes on of them is what was given.

    Attributes:
        sdp_of_heads: those arguments.
        sdp_num_units: into how many units the heads are cut.
        sdp_signature: of the module's own forward.
    """

    sdp_of_heads: OfHeads
    sdp_num_units: int
    sdp_signature: inspect.Signature

    def sdp_forward_of(self, units: Sequence[int], args: tuple, kwargs: dict[str, Any]) -> Any:
        """``units``: those that are held, in order."""
        (args, kwargs), before = of_held_heads(
            self.sdp_signature, (args, kwargs), self.sdp_of_heads, self.sdp_num_units, units
        )
        output = super().forward(*args, **kwargs)
        if isinstance(output, torch.Tensor):
            return before.get(id(output), output)
        return tuple(before.get(id(item), item) for item in output)


class CutArguments(HeldArguments):
    """Of a worker's subnetwork."""

    sdp_run: Run
    sdp_units: Sequence[int]

    def forward(self, *args, **kwargs):
        if self.sdp_run.computes == "full":
            return super().forward(*args, **kwargs)
        return self.sdp_forward_of(self.sdp_units, args, kwargs)


class VirtualArguments(HeldArguments):
    """Of a simulation."""

    cursor: Cursor
    sdp_units_of: dict[int, Sequence[int]]

    def forward(self, *args, **kwargs):
        if not self.cursor.trains:
            return super().forward(*args, **kwargs)
        return self.sdp_forward_of(self.sdp_units_of[self.cursor.subnetwork], args, kwargs)


def cut_arguments(model: nn.Module, local: LocalModule, run: Run) -> None:
    """Of one maskable module, in place, for a worker."""
    for owner in _mixed(model, local.module, CutArguments):
        vars(owner).update(sdp_run=run, sdp_units=local.units)


def virtual_arguments(model: nn.Module, plan: Plan, module: MaskableModule, cursor: Cursor) -> None:
    """Of one maskable module, in place, for a simulation."""
    units = {subnetwork: plan.held_units(module, subnetwork) for subnetwork in range(plan.num_subnetworks)}
    for owner in _mixed(model, module, VirtualArguments):
        vars(owner).update(cursor=cursor, sdp_units_of=units)


def _mixed(model: nn.Module, module: MaskableModule, cls: type[HeldArguments]) -> list[nn.Module]:
    owners = [model.get_submodule(name) for name in module.arguments]
    for owner, of_heads in zip(owners, module.arguments.values(), strict=True):
        signature = inspect.signature(type(owner).forward)
        mix_in(owner, cls)
        vars(owner).update(sdp_of_heads=of_heads, sdp_num_units=module.num_units, sdp_signature=signature)
    return owners
