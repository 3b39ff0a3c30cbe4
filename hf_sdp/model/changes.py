"""What is changed in the modules of a model, so that it can be taken back.

Patching and sharding change classes and attributes of many modules, each kind of layer in its own way. Instead of as
many ways back, the modules are compared before and after. What others have changed since then stays.
"""

import contextlib
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

_PARAMETERS = "_parameters"
_MISSING = object()


@dataclass
class _Entries:
    """Of one dict that a module has as an attribute: values before (of parameters on the meta device), and the keys
    after."""

    before: dict[Any, Any]
    added: set[Any]
    changed: set[Any]

    def take_back(self, now: dict) -> None:
        """In place. Keys come in the order of before; those that others have added come last."""
        kept = {key: value for key, value in now.items() if key not in self.added}
        restored = {
            key: value if key in self.changed else kept[key]
            for key, value in self.before.items()
            if key in self.changed or key in kept
        }
        others = {key: value for key, value in kept.items() if key not in restored}
        now.clear()
        now.update(restored | others)


@dataclass
class _OfModule:
    cls: type
    attributes: dict[str, Any] = field(default_factory=dict)
    dicts: dict[str, _Entries] = field(default_factory=dict)

    def take_back(self, module: nn.Module) -> None:
        own = vars(module)
        module.__class__ = self.cls
        for name, value in self.attributes.items():
            if value is _MISSING:
                own.pop(name, None)
            else:
                own[name] = value
        for name, entries in self.dicts.items():
            entries.take_back(own[name])


class Changes:
    """Those of one operation, in the modules that a model had before it. Full tensors are not kept.

    Buffers that are cut are: they are small, and nobody learns them.
    """

    def __init__(self) -> None:
        # Not weakly: copy.deepcopy of the model would leave the original's modules to the copy.
        self._of: dict[nn.Module, _OfModule] = {}

    def take_back(self) -> None:
        """Parameters that were replaced come back on the meta device, with their shapes."""
        for module, changed in self._of.items():
            changed.take_back(module)


@contextlib.contextmanager
def recorded(model: nn.Module, but: Collection[str] = ()) -> Iterator[Changes]:
    """What happens to the modules of ``model`` within is known afterwards, but for these attributes."""
    metas: dict[int, nn.Parameter] = {}  # one for each parameter, however many names it has
    before = {module: (type(module), _copied(vars(module), metas, but)) for module in model.modules()}
    changes = Changes()
    yield changes
    for module, (cls, attributes) in before.items():
        found = _compared(cls, attributes, module, but)
        if found is not None:
            changes._of[module] = found


@dataclass(frozen=True)
class _Parameter:
    """Of before: which object it was, and its likeness on the meta device."""

    original: weakref.ref
    meta: nn.Parameter


def _copied(own: dict[str, Any], metas: dict[int, nn.Parameter], but: Collection[str]) -> dict[str, Any]:
    result = {name: dict(value) if isinstance(value, dict) else value for name, value in own.items() if name not in but}
    for name, parameter in result[_PARAMETERS].items():
        if parameter is not None:
            if id(parameter) not in metas:
                like = torch.empty_like(parameter, device="meta")
                metas[id(parameter)] = nn.Parameter(like, requires_grad=parameter.requires_grad)
            result[_PARAMETERS][name] = _Parameter(weakref.ref(parameter), metas[id(parameter)])
    return result


def _is_same(before: Any, after: Any) -> bool:
    if isinstance(before, _Parameter):
        return after is not None and before.original() is after  # it may be gone
    return before is after


def _compared(cls: type, before: dict[str, Any], module: nn.Module, but: Collection[str]) -> _OfModule | None:
    own, found = vars(module), _OfModule(cls)
    for name in (before.keys() | own.keys()).difference(but):
        then, now = before.get(name, _MISSING), own.get(name, _MISSING)
        if isinstance(then, dict) and isinstance(now, dict):
            changed = {key for key, value in then.items() if not _is_same(value, now.get(key, _MISSING))}
            added = now.keys() - then.keys()
            if changed or added:
                plain = {k: v.meta if isinstance(v, _Parameter) else v for k, v in then.items()}
                keep = {k: v if k in changed else None for k, v in plain.items()}
                found.dicts[name] = _Entries(keep, set(added), changed)
        elif then is not now:
            found.attributes[name] = then
    return found if found.attributes or found.dicts or cls is not type(module) else None
