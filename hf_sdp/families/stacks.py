"""The stacks of a model: lists of layers that are called one by one, and add something to a stream."""

import contextlib
from collections.abc import Iterator

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..errors import SDPConfigError
from .branches import NotASum, branches
from .recording import Call, Recording
from .registered import Family


def layers(model: nn.Module, recording: Recording, family: Family) -> Iterator[tuple[int, str]]:
    """The number of the first call of each layer, and its name, in forward order. Raises: as ``find_blocks``."""
    return _Stacks(model, recording, family).layers()


class _Stacks:
    def __init__(self, model: nn.Module, recording: Recording, family: Family):
        self.model, self.recording, self.family = model, recording, family
        self.modules = dict(model.named_modules())
        self.calls_of = recording.calls_of()

    def layers(self) -> Iterator[tuple[int, str]]:
        for name in self.family.layers:
            if name not in self.modules:
                raise SDPConfigError(f"{type(self.model).__name__} has no module {name!r}, which is to be its layers.")
        lists = {layer for name in self.family.layers or self._stacks() for layer in self._members(name)}
        seen: set[str] = set()
        for number, call in enumerate(self.recording.calls):
            within = {self.recording.calls[outer].module for outer in self.recording.within(call.outer)}
            if call.module in lists and call.module not in seen and not within & lists:
                seen.add(call.module)
                yield number, call.module

    def _members(self, name: str) -> list[str]:
        return [f"{name}.{child}" for child, _ in self.modules[name].named_children()]

    def _stacks(self) -> list[str]:
        """Names of lists of layers. Stages, which have lists of layers in them and change the shape, are no layers."""
        lists = [(name, m) for name, m in self.modules.items() if isinstance(m, (nn.ModuleList, nn.Sequential))]
        found = {name for name, module in lists if self._is_stack(module) or self._is_chain(name, module)}
        of_layers = {type(layer) for name in found for layer in self.modules[name].children()}
        found |= {name for name, module in lists if len(module) and {type(layer) for layer in module} <= of_layers}

        def is_stage(layer: str) -> bool:
            has_layers = any(name.startswith(layer + ".") for name in found)
            return has_layers and not any(self._adds_up(call) for call in self.calls_of.get(layer, []))

        return [name for name, _ in lists if name in found and not any(map(is_stage, self._members(name)))]

    def _is_stack(self, module: nn.Module) -> bool:
        no_split = {name for m in self.modules.values() for name in (getattr(m, "_no_split_modules", None) or ())}
        layers = list(module.children())
        return (
            isinstance(module, nn.ModuleList)
            and bool(layers)
            and all(
                isinstance(layer, GradientCheckpointingLayer) or type(layer).__name__ in no_split for layer in layers
            )
        )

    def _is_chain(self, name: str, module: nn.Module) -> bool:
        """Whether each is called once, with what the one before it returned, and adds to it."""
        calls = [self.calls_of.get(layer, []) for layer in self._members(name)]
        if len(calls) < 2 or any(len(of_one) != 1 for of_one in calls):
            return False
        if len({type(layer) for layer in module.children()}) > 1:
            return False
        flat = [of_one[0] for of_one in calls]
        made = [call.outputs[0].operation if call.outputs else None for call in flat]
        is_chain = None not in made and all(
            before in after.arguments.values() for before, after in zip(made, flat[1:], strict=False)
        )
        return is_chain and any(self._adds_up(call) for call in flat)

    def _adds_up(self, call: Call) -> bool:
        """Convolutions that follow each other do not."""
        with contextlib.suppress(NotASum):
            return bool(branches(self.recording, self.recording.calls.index(call)))
        return False
