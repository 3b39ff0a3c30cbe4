"""What takes the place of a module that a worker does not hold. No parameters, and the host's arguments."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

ZERO = "0"
"""Adds nothing to the residual stream: a number, whatever the shape of the stream."""
ZEROS = "0..."
"""The same in the shape of the first argument, for layers that add other outputs to it in place."""


@dataclass(frozen=True)
class Outputs:
    """What a module returns where it is absent.

    Attributes:
        items: :data:`ZERO`, :data:`ZEROS`, None, or the name of an argument that is passed on.
        is_tuple: else there is one item, which is returned itself.
    """

    items: tuple[str | None, ...]
    is_tuple: bool = False

    @property
    def passed_on(self) -> list[str]:
        """Arguments that are returned."""
        return [item for item in self.items if item is not None and item not in (ZERO, ZEROS)]


class Absent(nn.Module):
    """Called in the place of a module of the class ``cls``, with its arguments."""

    def __init__(self, cls: type[nn.Module], outputs: Outputs):
        super().__init__()
        self.outputs, self.signature = outputs, inspect.signature(cls.forward)

    def forward(self, *args, **kwargs):
        arguments = self.signature.bind(None, *args, **kwargs).arguments
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        result = tuple(self._item(item, arguments, first) for item in self.outputs.items)
        return result if self.outputs.is_tuple else result[0]

    @staticmethod
    def _item(item: str | None, arguments: dict[str, Any], first: torch.Tensor) -> Any:
        if item == ZERO:
            return first.new_zeros(())
        if item == ZEROS:
            return torch.zeros_like(first)
        return None if item is None else arguments.get(item)
