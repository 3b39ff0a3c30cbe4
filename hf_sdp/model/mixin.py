"""Changing what an object of the host does, in place.

Everything that hf_sdp changes in a model is a class that is mixed into that of one of its modules. Nothing is set on
the instance: other libraries replace ``forward`` there, and ``copy.deepcopy`` would keep what is bound to the original.
The object stays the same, with its names, hooks and the class it was of.
"""

import functools

from torch import nn


def mix_in(module: nn.Module, *mixins: type) -> None:
    """Put ``mixins`` before the class of ``module``, in place. The class keeps its name: hosts look it up."""
    module.__class__ = _mixed(type(module), mixins)  # type: ignore[arg-type]


@functools.cache
def _mixed(cls: type, mixins: tuple[type, ...]) -> type:
    return type(cls.__name__, (*mixins, cls), {"__module__": cls.__module__})
