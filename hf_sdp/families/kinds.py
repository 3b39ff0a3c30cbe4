"""Kinds of blocks. All that one kind differs in from another is in its record, and nowhere else."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What all blocks of one kind have in common.

    Attributes:
        name: as it is in a plan; balance is kept for each kind.
        title: for people.
        attends: whether it has attention. Attention multiplies with the whole sequence. Its kernel saves its output,
            which is the input of the row-wise layer after it.
        num_units: ``(units at most, number of chunks) -> units`` at neuron level.
        unit_name: of several units, for people.
        narrow: ``(text config, units held, units of the full module)`` makes the config that of narrower blocks.
    """

    name: str
    title: str
    attends: bool
    num_units: Callable[..., int]
    unit_name: str
    narrow: Callable[..., None]


def head_dim(text_config) -> int:
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


def _all(units: int, chunks: int) -> int:
    return units


def _narrow_attention(text_config, held: int, num_units: int) -> None:
    text_config.head_dim = head_dim(text_config)
    text_config.num_attention_heads = text_config.num_attention_heads * held // num_units
    if getattr(text_config, "num_key_value_heads", None):
        text_config.num_key_value_heads = text_config.num_key_value_heads * held // num_units


def _groups_of_neurons(width: int, chunks: int) -> int:
    """Neurons are grouped as coarsely as even chunks allow, at most 128 together.

    Narrow matrices then keep sizes that matrix units like, and a plan stays small. Where even chunks are not possible,
    groups are as coarse as leaves one for each chunk.
    """
    group_sizes = [size for size in (128, 64, 32, 16, 8, 4, 2, 1) if width % size == 0]
    even = (width // size for size in group_sizes if (width // size) % chunks == 0)
    uneven = (width // size for size in group_sizes if width // size >= chunks)
    return next(even, None) or next(uneven, width)


def _narrow_mlp(text_config, held: int, num_units: int) -> None:
    text_config.intermediate_size = text_config.intermediate_size * held // num_units


def _one(units: int, chunks: int) -> int:
    return 1


def _cannot_narrow(text_config, held: int, num_units: int) -> None:
    raise AssertionError("held as a whole or not at all")


ATTENTION = Kind(
    name="attention",
    title="attention",
    attends=True,
    num_units=_all,
    unit_name="key/value heads",
    narrow=_narrow_attention,
)
MLP = Kind(
    name="mlp",
    title="MLP",
    attends=False,
    num_units=_groups_of_neurons,
    unit_name="groups of neurons",
    narrow=_narrow_mlp,
)
CROSS_ATTENTION = dataclasses.replace(ATTENTION, name="cross_attention", title="cross-attention")
MIXER = Kind(
    name="mixer",
    title="mixer",
    attends=False,
    num_units=_one,
    unit_name="mixers",
    narrow=_cannot_narrow,
)
EXPERTS = dataclasses.replace(MIXER, name="experts", title="experts", unit_name="experts", num_units=_all)
LAYER = dataclasses.replace(MIXER, name="layer", title="layer", attends=True, unit_name="layers")
KINDS = {kind.name: kind for kind in (ATTENTION, CROSS_ATTENTION, MLP, EXPERTS, MIXER, LAYER)}
