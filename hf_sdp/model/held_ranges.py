"""What is held of a tensor along the dim that is cut, and how its gradients are scaled there."""

from collections.abc import Iterable

import torch

from ..plan.plan import Plan

HeldRanges = tuple[tuple[int, int, float], ...]
"""``(start, stop, N/r)``: ranges along the cut dim that are held, and the factor of their gradients."""


def held_ranges(plan: Plan, subnetworks: Iterable[int]) -> dict[str, dict[int, HeldRanges]]:
    """Full parameter name -> subnetwork -> the ranges it holds along the cut dim, with factors of their gradients."""
    result: dict[str, dict[int, HeldRanges]] = {}
    for subnetwork in subnetworks:
        for module in plan.modules:
            runs = plan.held_runs(module, subnetwork)
            for name, dim in module.dims.items():
                ranges = [
                    (start, stop, scale)
                    for first, last, scale in runs
                    for start, stop in module.region(name, plan.shapes[name], first, last).ranges[dim]
                ]
                result.setdefault(name, {})[subnetwork] = tuple(sorted(ranges))
    return result


def held_gradient(gradient: torch.Tensor, dim: int, ranges: HeldRanges) -> torch.Tensor:
    """A new tensor: ``gradient`` scaled where it is held, and zero elsewhere."""
    held = torch.zeros_like(gradient)
    for start, stop, scale in ranges:
        torch.mul(gradient.narrow(dim, start, stop - start), scale, out=held.narrow(dim, start, stop - start))
    return held
