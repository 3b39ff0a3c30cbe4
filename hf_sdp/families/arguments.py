"""Arguments of modules with something for each head: position biases that a model makes once, for all layers."""

import inspect
from collections.abc import Sequence
from typing import Any

import torch

from .base import OfHeads

Given = tuple[tuple[Any, ...], dict[str, Any]]


def of_held_heads(
    signature: inspect.Signature, given: Given, of_heads: OfHeads, num_units: int, units: Sequence[int]
) -> tuple[Given, dict[int, torch.Tensor]]:
    """The arguments of a call with that of the held heads only.

    Args:
        signature: of the module's forward, with ``self``.
        given: all arguments.
        of_heads: those that are cut; an argument may be absent, or None.
        units: those of ``num_units`` that are held, in order.
    Returns: new arguments, and by the id of each that is new the one that was given.
    """
    arguments = by_name(signature, given)
    before: dict[int, torch.Tensor] = {}
    new: dict[int, torch.Tensor] = {}
    for name, (dim, heads) in of_heads.items():
        full = arguments.get(name)
        if full is not None:
            held = _of_units(full, dim, heads, num_units, units)
            before[id(held)], new[id(full)] = full, held
    args = tuple(new.get(id(value), value) for value in given[0])
    return (args, {name: new.get(id(value), value) for name, value in given[1].items()}), before


def by_name(signature: inspect.Signature, given: Given) -> dict[str, Any]:
    """All arguments of a call but ``self``, those of ``**kwargs`` among them."""
    arguments = dict(signature.bind(None, *given[0], **given[1]).arguments)
    del arguments[next(iter(arguments))]
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments |= arguments.pop(parameter.name, {})
    return arguments


def _of_units(full: torch.Tensor, dim: int, heads: int, num_units: int, units: Sequence[int]) -> torch.Tensor:
    by_unit = full.unflatten(dim, (-1, num_units, heads // num_units))
    index = torch.tensor(units, device=full.device)
    return by_unit.index_select(dim + 1, index).flatten(dim, dim + 2)
