"""What is known of the structure of a model: its layers, and what can be left out of them."""

from dataclasses import dataclass, field

from .absent import Outputs


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
    """

    layers: tuple[str, ...]
    outer: tuple[tuple[str, ...], ...]
    blocks: tuple[Block, ...] = ()
    absent: dict[str, Outputs] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
