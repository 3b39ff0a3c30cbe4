"""From one plan to the next, in memory: weights and optimizer state go to the workers that store them from then on.

One full parameter after the other, its weights and then each tensor of its state; what is no longer stored is freed at
once. No worker ever has more than what it stores before or after, and one full parameter on its way.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ..compat import forget_values, has_unreduced_gradients, reset_sharded_parameters
from ..errors import SDPStateError
from ..model.state import Held, local_tensor
from ..plan.placement import owners, stored_by_all
from ..plan.region import Region, rows_of_shard
from ..world.agreement import of_everyone, together
from .exchange import Owned, find_route, move
from .fsdp import fsdp_modules
from .optimizer import local_shards, train_from_now_on
from .sharded import Sharded

_Kind = tuple[int, str] | None
"""A tensor of an optimizer's state, by the optimizer's number and its key; None: the weights."""


class _Stored(NamedTuple):
    """A tensor that this worker has. It sends ``part`` of it, the region ``owned``: where every holder stores all of a
    slice, each sends as much of it."""

    region: Region
    tensor: torch.Tensor
    owned: Region
    part: torch.Tensor


class Handover:
    """What the workers store of a model and of its optimizers; nothing else refers to it any more, once the model is
    taken back.

    ``bytes_sent``: by this worker to others, so far.
    Raises: SDPStateError on every worker, and nothing is changed then: gradients or hooks of parameters, or state of an
        optimizer, which would be lost. Making one is a collective on the control group.
    """

    def __init__(self, model: nn.Module, sharded: Sharded, optimizers: Sequence[torch.optim.Optimizer]):
        self.optimizers = list(optimizers)
        self.bytes_sent = 0
        self.old = list(sharded.parameters.values())
        held = self.held = sharded.held
        self.senders = dataclasses.replace(held.placement, sharding="full")
        self.sources = owners(held.plan, self.senders)
        self.were_stored = stored_by_all(held.plan, held.placement)
        self.tensors: dict[tuple[str, _Kind], list[_Stored]] = {}
        numbers: dict[tuple[int, str], dict[str, Any]] = {}
        with together(sharded.control_group):
            refuse_gradients(model, sharded.parameters)
            refuse_lost_state(sharded, self.optimizers)
            hook = said_of_hook(sharded)
            if hook is not None:
                raise SDPStateError(hook)
            names = {p: held.subnetwork.tensors[n].region.name for n, p in sharded.parameters.items()}
            for local_name, parameter in sharded.parameters.items():
                self._take(local_name, None, local_tensor(parameter.detach()))
            for number, optimizer in enumerate(self.optimizers):
                for local_name, parameter in sharded.parameters.items():
                    for key, value in optimizer.state.get(parameter, {}).items():
                        if not isinstance(value, torch.Tensor) or value.dim() == 0:
                            numbers.setdefault((number, names[parameter]), {})[key] = _sent(value)
                        else:
                            self._take(local_name, (number, key), local_tensor(value))
            groups = [[{names[p] for p in g["params"]} for g in o.param_groups] for o in self.optimizers]
        dtypes = {place: stored[0].tensor.dtype for place, stored in self.tensors.items()}
        learns = {name: p.requires_grad for p, name in names.items()}
        everyone = of_everyone((dtypes, learns, numbers, groups), sharded.control_group)
        self.dtypes = _union(theirs[0] for theirs in everyone)
        self.learns = _union(theirs[1] for theirs in everyone)
        self.numbers = _union(theirs[2] for theirs in everyone)
        by_optimizer = zip(*(theirs[3] for theirs in everyone), strict=True)
        self.groups = [[set().union(*names) for names in zip(*groups, strict=True)] for groups in by_optimizer]
        self.kinds: dict[str, list[tuple[int, str]]] = {}
        for name, kind in sorted(place for place in self.dtypes if place[1] is not None):
            self.kinds.setdefault(name, []).append(kind)
        for optimizer in self.optimizers:
            train_from_now_on(optimizer, [{} for _ in optimizer.param_groups], {})

    def _take(self, local_name: str, kind: _Kind, tensor: torch.Tensor) -> None:
        local = self.held.subnetwork.tensors[local_name]
        region, owned = self.held.stored(local_name), self.senders.stored(local.region, local.holders, self.held.rank)
        part = tensor
        if owned != region:
            start, stop = rows_of_shard(len(tensor), *self.senders.place(local.holders, self.held.rank))
            part = tensor[start:stop]
        self.tensors.setdefault((region.name, kind), []).append(_Stored(region, tensor, owned, part))

    @torch.no_grad()
    def give(self, model: nn.Module, held: Held, device: torch.device) -> None:
        """Give memory on ``device`` to the parameters of a model that is sharded by another plan, on the meta device,
        and the values that the workers have; its optimizers train these from now on. Collective over the world."""
        for old in self.old:  # whoever still has it would read what is freed below
            forget_values(old)
        places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for last, parameter in module._parameters.items():
                if parameter is not None:
                    places.setdefault(parameter, []).append((module, last))
        before = dict(model.named_parameters())
        targets = stored_by_all(held.plan, held.placement)
        parameters: dict[str, nn.Parameter] = {}
        states: list[dict[nn.Parameter, dict[str, Any]]] = [{} for _ in self.optimizers]
        for name in held.plan.shapes:
            for local_name in held.subnetwork.local_names[name]:
                meta = before[local_name]
                new = nn.Parameter(torch.empty_like(meta, device=device), requires_grad=meta.requires_grad)
                parameters[local_name] = new
                for module, last in places[meta]:
                    module._parameters[last] = new
            mine = {n: parameters[n] for n in held.subnetwork.local_names[name]}
            self._move(name, None, targets[name], {held.stored(n): local_tensor(p) for n, p in mine.items()}, device)
            for kind in self.kinds.get(name, ()):
                tensors = {n: torch.empty_like(local_tensor(p), dtype=self.dtypes[name, kind]) for n, p in mine.items()}
                self._move(name, kind, targets[name], {held.stored(n): t for n, t in tensors.items()}, device)
                for n, tensor in tensors.items():
                    states[kind[0]].setdefault(mine[n], {})[kind[1]] = tensor
            for number, state in enumerate(states):
                for p in mine.values():
                    for key, value in self.numbers.get((number, name), {}).items():
                        state.setdefault(p, {})[key] = _received(value, device)
        for sharded_module in fsdp_modules(model):
            reset_sharded_parameters(sharded_module)
        for optimizer, groups, state in zip(self.optimizers, self.groups, states, strict=True):
            local_names = held.subnetwork.local_names
            of_groups = [
                {n: parameters[n] for name in held.plan.shapes if name in names for n in local_names[name]}
                for names in groups
            ]
            train_from_now_on(optimizer, of_groups, state)

    def _move(
        self, name: str, kind: _Kind, targets: list[Owned], wanted: dict[Region, torch.Tensor], device: torch.device
    ) -> None:
        """One tensor; what this worker had of it is freed."""
        had, dtype, rank = self.tensors.pop((name, kind), []), self.dtypes[name, kind], self.held.rank
        had_already = set(self.were_stored[name])
        for stored in had:
            if stored.region in wanted:
                wanted[stored.region].copy_(stored.tensor)
        part_of = {stored.owned: stored.part for stored in had}
        mine = [(region, part_of[region]) for owner, region in self.sources[name] if owner == rank]
        targets = [target for target in targets if target not in had_already]
        into = [(region, wanted[region]) for owner, region in targets if owner == rank]
        if targets:  # else all have what they store from now on
            route = find_route(self.sources[name], targets)
            move(route, mine, into, torch.empty(0, dtype=dtype, device=device))
            self.bytes_sent += dtype.itemsize * (sum(route.send_sizes) - route.send_sizes[rank])
        for stored in had:  # FSDP2 refers to it in circles, which are not collected at once
            if stored.tensor.untyped_storage().resizable():  # not after .numpy()
                stored.tensor.untyped_storage().resize_(0)


def refuse_gradients(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raises SDPStateError when a parameter has a gradient that is not zero, or FSDP2 keeps one that is not reduced."""
    with_gradient = (n for n, p in parameters.items() if p.grad is not None and local_tensor(p.grad).any())
    unreduced = (n for n, m in model.named_modules() if isinstance(m, FSDPModule) and has_unreduced_gradients(m))
    found = next(itertools.chain(with_gradient, unreduced), None)
    if found is not None:
        raise SDPStateError(
            f"{found or type(model).__name__} has a gradient, which would be lost. A phase begins between two steps: "
            "call it after optimizer.step() and optimizer.zero_grad()."
        )


def refuse_lost_state(sharded: Sharded, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raises SDPStateError when an optimizer that trains the model is none of these, or keeps for a parameter what is
    neither a number nor of its shape."""
    name = next((type(other).__name__ for other in sharded.stepped if other not in optimizers), None)
    if name is not None:
        raise SDPStateError(
            f"{name} trains {sharded.held.model_name}, and follow_schedule was not given it: its state would be lost. "
            "Give follow_schedule all optimizers that train the model."
        )
    for optimizer in optimizers:
        with local_shards(optimizer):
            pass  # after a step that raised, its state is by shards
        for local_name, parameter in sharded.parameters.items():
            stored = tuple(local_tensor(parameter).shape)
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, torch.Tensor) and value.dim() > 0 and tuple(value.shape) != stored:
                    raise SDPStateError(
                        f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for {local_name}, of "
                        f"which this worker stores {stored}: it cannot go to others."
                    )


def said_of_hook(sharded: Sharded) -> str | None:
    """Of the first parameter with a hook for its gradient, what becomes of that where a phase begins."""
    hooked = (n for n, p in sharded.parameters.items() if p._backward_hooks or p._post_accumulate_grad_hooks)
    name = next(hooked, None)
    if name is None:
        return None
    return (
        f"{name} has a hook for its gradient, which would never be called in the next phase: parameters are new ones. "
        "Remove it before the phase begins, and register it again after that."
    )


def _sent(value: Any) -> tuple[Any, str | None]:
    """A number of an optimizer's state as it can be sent, and of which kind its device is: others have other ones."""
    return (value.cpu(), value.device.type) if isinstance(value, torch.Tensor) else (value, None)


def _received(sent: tuple[Any, str | None], device: torch.device) -> Any:
    value, device_type = sent
    if device_type is None:
        return value
    return value.to(device if device_type == device.type else device_type, copy=True)


def _union(dicts: Iterable[dict]) -> dict:
    return {key: value for each in dicts for key, value in each.items()}
