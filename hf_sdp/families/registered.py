"""What is said of model types by others, where it cannot be found."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..errors import SDPConfigError


@dataclass(frozen=True)
class Family:
    """What is said of a model type. All that is left out is found.

    Attributes:
        layers: names of its lists of layers, from the model's root (``"model.layers"``).
        inputs: ``inputs(model, length)`` makes the arguments of a forward in which all layers are called, of sequences
            of ``length`` tokens; tensors on the meta device.
        held_by_all: regular expressions; layers and blocks whose name has one of them are held by all workers.
    """

    layers: tuple[str, ...] = ()
    inputs: Callable[[Any, int], dict[str, Any]] | None = None
    held_by_all: tuple[str, ...] = ()

    def keeps(self, name: str) -> bool:
        """Whether all workers hold a layer or block."""
        return any(re.search(pattern, name) for pattern in self.held_by_all)


_FAMILIES: dict[str, Family] = {}


def register_family(model_type: str, family: Family) -> None:
    """Say how models of a type are built. On every worker, before a model of it is planned or patched.

    Raises: SDPConfigError when something else has been said of the type, or ``family`` is none.
    """
    if not isinstance(family, Family):
        raise SDPConfigError(f"A family is an hf_sdp.Family, got {type(family).__name__}.")
    for name in ("layers", "held_by_all"):
        if isinstance(getattr(family, name), str):
            raise SDPConfigError(f"{name} of a family is a tuple of names, got the text {getattr(family, name)!r}.")
    known = _FAMILIES.setdefault(model_type, family)
    if known != family:
        raise SDPConfigError(f"Something else has been registered for model_type={model_type!r}: {known}.")


def family_of(model_type: str | None) -> Family:
    """What was said of a type; nothing, by default."""
    return _FAMILIES.get(model_type or "", Family())
