"""The two facts about a model family that its config does not carry."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Block:
    """A residual sub-block ``x + module(norm(x))``; names are relative to the decoder layer."""

    kind: Literal["attention", "mlp"]
    norm: str
    module: str


@dataclass(frozen=True)
class Family:
    """``layers``: the ModuleList of decoder layers, relative to the base model; ``blocks``: in forward order."""

    layers: str
    blocks: tuple[Block, ...]
