"""Optimizer state in the canonical layout: by full parameter name, in full shapes, each element once.

Tensors of the state that have the shape of their parameter are written with torch.distributed.checkpoint, every worker
what it owns; loading reads from it just the regions that a worker stores, whatever plan or world wrote them. All else
(step counters, learning rates, which parameter is in which group) is one JSON file.
"""

import json
from pathlib import Path

import torch
from torch import nn

from ..engine.optimizer import inner_optimizer, local_shards
from ..engine.same_optimizer import HOW_TO_STEP, OF_THIS_WORKER
from ..engine.sharded import control_group
from ..errors import SDPStateError
from ..model.state import local_tensor
from ..world.agreement import is_rank_0, of_everyone, together
from . import tensors as boxes
from .saved_optimizer import GROUPS, TENSORS, SavedByTorch, SavedOptimizer, Wanted, from_json
from .stored import full_shapes, stored_parameters
from .tensors import Boxes


@torch.no_grad()
def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Write the state of a prepared ``optimizer`` into ``folder``. Collective.

    Raises: SDPStateError for state that is neither a number nor of its parameter's shape; on all workers when any of
        them cannot write.
    """
    optimizer, group = inner_optimizer(optimizer), control_group(model)
    stored = stored_parameters(model)
    tensors: dict[str, Boxes] = {}
    numbers: dict[str, dict] = {}
    with together(group):
        for parameter, state in optimizer.state.items():
            s = stored[parameter]
            for key, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim() > 0:
                    if s.region.numel and tuple(value.shape) != s.region.shape:
                        raise SDPStateError(
                            f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for {s.name}, of "
                            f"which this worker stores {s.region.shape}: it cannot be saved independently of the plan."
                        )
                    if s.owned:
                        name = f"{s.name}/{key}"
                        tensors.setdefault(name, Boxes(s.shape, value.dtype)).add(s.region, local_tensor(value))
                else:
                    numbers.setdefault(s.name, {})[key] = _to_json(value)
        groups = [
            {
                **{key: _to_json(value) for key, value in g.items() if key not in OF_THIS_WORKER},
                "params": list(dict.fromkeys(stored[p].name for p in g["params"])),
            }
            for g in optimizer.param_groups
        ]
    boxes.write(folder / TENSORS, tensors, group)
    groups, numbers = _union(of_everyone((groups, numbers), group), list(full_shapes(model)))
    with together(group):
        if is_rank_0():
            content = {"optimizer": type(optimizer).__name__, "groups": groups, "numbers": numbers}
            (folder / GROUPS).write_text(json.dumps(content, indent=1) + "\n")


def _union(everyone: list, order: list[str]) -> tuple[list[dict], dict]:
    """No worker has all parameters, all have the same groups."""
    groups, numbers = [dict(g) for g in everyone[0][0]], {}
    for i, g in enumerate(groups):
        names = {name for theirs, _ in everyone for name in theirs[i]["params"]}
        g["params"] = [name for name in order if name in names]
    for _, theirs in everyone:
        numbers.update(theirs)
    return groups, {name: numbers[name] for name in order if name in numbers}


def _to_json(value):
    if isinstance(value, torch.Tensor):
        return {"value": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (tuple, list)):
        return [_to_json(v) for v in value]
    raise SDPStateError(f"Optimizer state of type {type(value).__name__} ({value!r}) cannot be saved.")


@torch.no_grad()
def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, saved: SavedOptimizer | SavedByTorch) -> None:
    """Give a prepared ``optimizer`` the saved state of the regions it steps on. Collective.

    Options of a group (learning rate, weight decay, ...) come from the saved group that has its parameters, but for
    those that say how to compute a step (fused, foreach). Reads into the device's memory what stays there.

    ``saved`` must have passed :func:`check_optimizer`.
    """
    optimizer = inner_optimizer(optimizer)
    stored = stored_parameters(model)
    wanted: list[Wanted] = []
    state: dict[int, dict] = {}
    for number, parameter in enumerate(p for g in optimizer.param_groups for p in g["params"]):
        s = stored[parameter]
        # Clones: several parts of one full parameter count their steps each.
        numbers = saved.numbers.get(s.name, {})
        values = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in numbers.items()}
        for key, (_, dtype) in saved.tensors.get(s.name, {}).items():
            local = local_tensor(parameter)
            values[key] = torch.empty(local.shape, dtype=dtype, device=local.device)
            if s.region.numel:
                wanted.append(Wanted(s.region, key, values[key]))
        if values:
            state[number] = values
    saved.read(wanted)
    saved_group = {name: g for g in saved.groups for name in g["params"]}
    with local_shards(optimizer):
        groups = optimizer.state_dict()["param_groups"]
    for number, g in enumerate(groups):
        names = [stored[p].name for p in optimizer.param_groups[number]["params"]]
        options = saved_group[names[0]] if names else saved.groups[min(number, len(saved.groups) - 1)]
        for key, value in options.items():
            if key not in (*OF_THIS_WORKER, *HOW_TO_STEP):
                g[key] = from_json(value, like=g.get(key)) if not isinstance(value, torch.Tensor) else value
    with local_shards(optimizer):
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, saved: SavedOptimizer | SavedByTorch) -> None:
    """Raises SDPStateError on every worker for state of another optimizer, model or grouping. Collective."""
    with together(control_group(model)):
        _check(inner_optimizer(optimizer), model, saved)


def _check(optimizer: torch.optim.Optimizer, model: nn.Module, saved: SavedOptimizer | SavedByTorch) -> None:
    if saved.optimizer not in (None, type(optimizer).__name__):
        raise SDPStateError(
            f"The checkpoint has the state of {saved.optimizer}, this run trains with {type(optimizer).__name__}. "
            "Use the same optimizer, or start anew from the weights."
        )
    shapes = full_shapes(model)
    for name, keys in saved.tensors.items():
        for key, (shape, _) in keys.items():
            if shape != tuple(shapes.get(name, ())):
                raise SDPStateError(
                    f"The checkpoint has {key} of shape {shape} for {name}, the model's is {shapes.get(name)}. "
                    "It is the state of another model."
                )
    _check_whole(saved)
    saved_number = {name: i for i, g in enumerate(saved.groups) for name in g["params"]}
    stored = stored_parameters(model)
    for number, g in enumerate(optimizer.param_groups):
        found = {saved_number.get(stored[p].name, -1) for p in g["params"]}
        if len(found) > 1 or -1 in found:
            missing = [stored[p].name for p in g["params"] if stored[p].name not in saved_number]
            raise SDPStateError(
                f"Parameter group {number} of this run is not one of the checkpoint's: its parameters were in groups "
                f"{sorted(found - {-1})}{f', {missing[:3]} in none' if missing else ''}. Make the optimizer as it was."
            )
        for its_number in found:
            _check_options(g, saved.groups[its_number], type(optimizer).__name__)


def _check_whole(saved: SavedOptimizer | SavedByTorch) -> None:
    """Parameters of one group have the same state; one that was never stepped has none."""
    for g in saved.groups:
        keys = {name: {*saved.tensors.get(name, ()), *saved.numbers.get(name, ())} for name in g["params"]}
        all_keys = set().union(*keys.values())
        for name, found in keys.items():
            if found and found != all_keys:
                raise SDPStateError(
                    f"The checkpoint's optimizer state is not whole: {name} has {sorted(found)}, others of its group "
                    f"also have {sorted(all_keys - found)}."
                )


def _check_options(now: dict, then: dict, optimizer: str) -> None:
    """A plain optimizer's file does not say its class: another one has other options. (A newer version of the same one
    has more of them.)"""
    ignored = {"initial_lr", *OF_THIS_WORKER, *HOW_TO_STEP}
    unknown, missing = then.keys() - now.keys() - ignored, now.keys() - then.keys() - ignored
    if unknown and missing:
        raise SDPStateError(
            f"The checkpoint has the state of another optimizer: its groups have {sorted(unknown)}, those of this "
            f"run's {optimizer} {sorted(missing)}. Use the same optimizer, or start anew from the weights."
        )
    for key in now.keys() & then.keys() - ignored:
        if not _is_like(then[key], now[key]):
            raise SDPStateError(f"The checkpoint's optimizer has {key}={then[key]!r}, this run's {now[key]!r}.")


def _is_like(then, now) -> bool:
    if isinstance(now, (tuple, list)):
        return isinstance(then, (tuple, list)) and len(then) == len(now) and all(map(_is_like, then, now))
    return not isinstance(now, (int, float)) or isinstance(then, (int, float, dict, torch.Tensor))
