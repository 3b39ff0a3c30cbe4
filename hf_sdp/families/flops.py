"""What the modules of a model compute, counted in a recording of it."""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from ..errors import SDPConfigError
from .inputs import BATCH
from .model_config import config_key
from .recording import Recording, record

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Flops:
    """Of a forward, for one token. ``of_weights``: those of products with weights; the rest is of activations alone."""

    all: int = 0
    of_weights: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.all + other.all, self.of_weights + other.of_weights)


@dataclass(frozen=True)
class ModelFlops:
    """Of the calls of a model's modules with sequences of ``length`` tokens (an encoder's and a decoder's alike).

    All pairs of tokens are counted where they attend to each other, as kernels without a mask compute them; of experts
    those that a token is sent to.
    """

    recording: Recording
    length: int

    def within(self, modules: Iterable[str]) -> Flops:
        """Of the calls of these modules, and those in them."""
        wanted = set(modules)
        return self._total(n for n, around in self._of_operations if wanted & around)

    def outside(self, modules: Iterable[str], layers: Iterable[str]) -> Flops:
        """Of all else that a worker computes whatever it holds. What no layer and no parameter takes part in (angles
        of positions) is left out: it is computed once for all sequences."""
        unwanted, of_layers = set(modules), set(layers)
        operations = self.recording.operations
        return self._total(
            n
            for n, around in self._of_operations
            if not unwanted & around and (operations[n].is_of_weights or of_layers & around)
        )

    @cached_property
    def _of_operations(self) -> list[tuple[int, set[str]]]:
        """Number of each operation that has any, and the modules around it."""
        calls = self.recording.calls
        return [
            (n, {calls[call].module for call in self.recording.within(operation.call)})
            for n, operation in enumerate(self.recording.operations)
            if operation.flops
        ]

    def _total(self, numbers: Iterable[int]) -> Flops:
        chosen = [self.recording.operations[n] for n in numbers]
        tokens = BATCH * self.length
        return Flops(
            sum(operation.flops for operation in chosen) // tokens,
            sum(operation.flops for operation in chosen if operation.is_of_weights) // tokens,
        )


_cache: dict[tuple[type, str, int], ModelFlops] = {}


def flops_of(model: "PreTrainedModel", length: int) -> ModelFlops:
    """Of a full model, on any device, for sequences of ``length`` tokens. Nothing is allocated.

    Raises: SDPConfigError when the class of the model cannot run on the meta device.
    """
    key = (type(model), config_key(model.config), length)
    if key not in _cache:
        try:
            with torch.device("meta"):
                full = type(model)(copy.deepcopy(model.config))
            _cache[key] = ModelFlops(record(full, length), length)
        except Exception as error:  # whatever the class says
            raise SDPConfigError(
                f"FLOPs of {type(model).__name__} cannot be counted for sequences of {length}: on the meta device it "
                f"raises {type(error).__name__}: {error}"
            ) from error
    return _cache[key]
