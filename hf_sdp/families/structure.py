"""``Structure``: the names of the modules of a model that are sharded on their own."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from . import family_of
from .base import Stack

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Structure:
    """Names of modules.

    Attributes:
        layers: the layers of all stacks, in forward order; a plan counts them in this order.
        outer: embeddings and head, each with those that share its weight.
    """

    layers: tuple[str, ...]
    outer: tuple[tuple[str, ...], ...]


def stack_layers(model: "PreTrainedModel") -> Iterator[tuple[Stack, str, nn.Module]]:
    """``(stack, name, layer)`` of every layer of the model, in forward order.

    Raises: SDPConfigError when the family is unknown.
    """
    prefix = model.base_model_prefix + "." if model.base_model is not model else ""
    for stack in family_of(model.config).stacks:
        for index, layer in enumerate(model.get_submodule(prefix + stack.layers)):
            yield stack, f"{prefix}{stack.layers}.{index}", layer


def structure_of(model: "PreTrainedModel") -> Structure:
    """The structure of a full transformers model, on any device. Raises: as :func:`stack_layers`."""
    names = {module: name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    outer: tuple[tuple[str, ...], ...] = ((names[embeddings],),)
    if head is not None:
        tied = head.weight is embeddings.weight
        outer = ((names[embeddings], names[head]),) if tied else (*outer, (names[head],))
    return Structure(tuple(name for _, name, _ in stack_layers(model)), outer)
