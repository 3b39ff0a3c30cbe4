"""The facts about a model family that its config does not carry."""

from dataclasses import dataclass

from .kinds import Kind


@dataclass(frozen=True)
class Block:
    """A residual sub-block ``x + module(norm(x))``; names are relative to the layer."""

    kind: Kind
    norm: str
    module: str


@dataclass(frozen=True)
class Stack:
    """A list of layers of one structure.

    Attributes:
        layers: name of the ModuleList, relative to the base model.
        blocks: of each layer, in forward order.
    """

    layers: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class Family:
    """``stacks``: of layers, in forward order."""

    stacks: tuple[Stack, ...]
