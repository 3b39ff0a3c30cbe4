"""What is known of the structure of a model: its layers, and what can be left out of them."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from .absent import Outputs

Ranges = tuple[tuple[int, int], ...]
"""``(start, stop)`` along one dim."""
OfHeads = dict[str, tuple[int, int]]
"""Argument of a module -> the dim of its heads, and their number. There, batch and heads may be one dim."""


@dataclass(frozen=True)
class Block:
    """A residual branch of a layer. Names are full names of modules.

    Attributes:
        kind: name of its kind.
        layer: number of its layer.
        modules: those that are the branch's alone, in forward order: norms, and what computes.
        main: the one of them whose name it has.
    """

    kind: str
    layer: int
    modules: tuple[str, ...]
    main: str


@dataclass(frozen=True)
class Structure:
    """Of a full model.

    Attributes:
        layers: names of the layers of all stacks, in forward order; a plan counts them in this order.
        outer: embeddings and head, each with those that share its weight.
        blocks: of all layers, in forward order.
        absent: name of each module of a block, and of each layer that can be left out -> what it then returns.
        kept: layer or module that has to be held by all -> why.
        summands: as blocks, but they cannot be left out: what is added to something else than the stream.
    """

    layers: tuple[str, ...]
    outer: tuple[tuple[str, ...], ...]
    blocks: tuple[Block, ...] = ()
    absent: dict[str, Outputs] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    summands: tuple[Block, ...] = ()

    def stage(self, layer: int) -> tuple[str, ...]:
        """Of a layer: the numbers of the lists around it. Layers are of different shapes in different stages."""
        return tuple(part for part in self.layers[layer].split(".")[:-1] if part.isdigit())


@dataclass(frozen=True)
class Cut:
    """How a block is cut. Names are full names.

    Attributes:
        kind, name: of what is cut: the block itself, or one of the modules in it.
        units: into how many equal parts at most: heads with their keys and values, neurons, or experts.
        dims: parameter -> the dim that is cut.
        packed: parameter -> ranges along it, each of which is cut, where it is not one.
        sizes: module -> its attributes that are proportional to what is held; ``config.x`` is one of its config's.
        arguments: module -> those of its arguments that have something for each head.
        switched: modules with some of ``dims`` that a forward may leave out: adapters.
    """

    kind: str
    name: str
    units: int
    dims: dict[str, int]
    packed: dict[str, Ranges] = field(default_factory=dict)
    sizes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    arguments: dict[str, OfHeads] = field(default_factory=dict)
    switched: tuple[str, ...] = ()

    def renamed(self, old: str, new: str) -> "Cut":
        """The same of another layer."""
        return dataclasses.replace(self, **renamed_fields(self, old, new))


def renamed_fields(cut: Any, old: str, new: str) -> dict[str, Any]:
    """Fields of a :class:`Cut`, or of what is made of one, for another layer: those that have names in them."""
    tables = ((table, getattr(cut, table)) for table in ("dims", "packed", "sizes", "arguments"))
    of_new = {table: {renamed(name, old, new): value for name, value in by_name.items()} for table, by_name in tables}
    switched = tuple(renamed(name, old, new) for name in cut.switched)
    return {"name": renamed(cut.name, old, new), "switched": switched, **of_new}


def renamed(name: str, old: str, new: str) -> str:
    """The name of the same in another layer."""
    return new + name.removeprefix(old)


class CannotCut(Exception):
    """Why a block is held as a whole."""
