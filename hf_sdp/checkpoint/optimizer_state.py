"""Optimizer state in the canonical layout: by full parameter name, in full shapes, each element once.

Tensors of the state that have the shape of their parameter are written with torch.distributed.checkpoint, every worker
what it owns; loading reads from it just the regions that a worker stores, whatever plan or world wrote them. All else
(step counters, learning rates, which parameter is in which group) is one JSON file.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ..engine.optimizer import local_shards
from ..engine.sharded import control_group, find_sharded
from ..errors import SDPStateError
from ..model.state import find_state, local_tensor, unwrap
from ..plan.region import Region, Shape
from ..world.agreement import together
from . import tensors as boxes
from .tensors import Boxes

TENSORS, GROUPS = "tensors", "groups.json"
_OF_THIS_RUN = ("foreach", "fused", "capturable", "differentiable")  # how to step, not what the step is


class Wanted(NamedTuple):
    """State to be read: the tensor ``key`` of a region, and where it goes, of the region's shape."""

    region: Region
    key: str
    tensor: torch.Tensor


@dataclass(frozen=True)
class Stored:
    """A parameter of this process.

    Attributes:
        region: what it stores of which full parameter.
        shape: of the full parameter.
        owned: whether this process is the owner of the region.
    """

    region: Region
    shape: Shape
    owned: bool

    @property
    def name(self) -> str:
        return self.region.name


def stored_parameters(model: nn.Module) -> dict[nn.Parameter, Stored]:
    """Of a sharded SDP model what this worker stores; of any other model its full parameters, owned by rank 0."""
    model = unwrap(model)
    sharded = find_sharded(model)
    if sharded is None:
        owned = not dist.is_initialized() or dist.get_rank() == 0
        return {
            p: Stored(Region.whole(name, tuple(p.shape)), tuple(p.shape), owned) for name, p in model.named_parameters()
        }
    held = sharded.held
    mine = {region for regions in held.owners.values() for rank, region in regions if rank == held.rank}
    result = {}
    for local_name, parameter in sharded.parameters.items():
        region = held.stored(local_name)
        result[parameter] = Stored(region, held.plan.shapes[region.name], region in mine)
    return result


@torch.no_grad()
def save_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, folder: Path) -> None:
    """Write the state of a prepared ``optimizer`` into ``folder``. Collective.

    Raises: SDPStateError for state that is neither a number nor of its parameter's shape; on all workers when any of
        them cannot write.
    """
    optimizer, group = getattr(optimizer, "optimizer", optimizer), control_group(model)
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
                            f"{type(optimizer).__name__} keeps {key} of shape {tuple(value.shape)} for {s.name}, of which "
                            f"this worker stores {s.region.shape}: it cannot be saved independently of the plan."
                        )
                    if s.owned:
                        name = f"{s.name}/{key}"
                        tensors.setdefault(name, Boxes(s.shape, value.dtype)).add(s.region, local_tensor(value))
                else:
                    numbers.setdefault(s.name, {})[key] = _to_json(value)
        groups = [
            {
                **{key: _to_json(value) for key, value in g.items() if key != "params"},
                "params": list(dict.fromkeys(stored[p].name for p in g["params"])),
            }
            for g in optimizer.param_groups
        ]
    boxes.write(folder / TENSORS, tensors, group)
    if dist.is_initialized():
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (groups, numbers), group=group)
        groups, numbers = _union(everyone, list(_order(model)))
    with together(group):
        if not dist.is_initialized() or dist.get_rank() == 0:
            content = {"optimizer": type(optimizer).__name__, "groups": groups, "numbers": numbers}
            (folder / GROUPS).write_text(json.dumps(content, indent=1) + "\n")


def _order(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Full parameter name -> shape, in the order of the full model's ``named_parameters()``."""
    state = find_state(model)
    if state is not None:
        return state.held.plan.shapes
    return {name: tuple(p.shape) for name, p in unwrap(model).named_parameters()}


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


def _from_json(value, like=None):
    if isinstance(value, dict):
        return torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]))
    if isinstance(value, list):
        return tuple(_from_json(v) for v in value) if not isinstance(like, list) else [_from_json(v) for v in value]
    if isinstance(like, torch.Tensor):  # lr as a tensor (capturable)
        return torch.full_like(like, value)
    return value


class SavedOptimizer:
    """State written by :func:`save_optimizer`.

    Attributes: ``optimizer`` (class name), ``groups`` (options and ``params`` by full name), ``numbers`` (full name ->
    key -> value), ``tensors`` (full name -> key -> ``(shape, dtype)``).
    """

    def __init__(self, folder: Path, model: nn.Module):
        self.folder, self.group = folder, control_group(model)
        content = json.loads((folder / GROUPS).read_text())
        self.optimizer, self.groups = content["optimizer"], content["groups"]
        self.numbers = {n: {k: _from_json(v) for k, v in s.items()} for n, s in content["numbers"].items()}
        self.tensors: dict[str, dict[str, tuple]] = {}
        for entry, shape_and_dtype in boxes.stored(folder / TENSORS).items():
            name, _, key = entry.rpartition("/")
            self.tensors.setdefault(name, {})[key] = shape_and_dtype

    def read(self, wanted: list[Wanted]) -> None:
        """Fill the tensors: only the elements of their regions are read. Collective."""
        tensors: dict[str, Boxes] = {}
        for region, key, tensor in wanted:
            shape, _ = self.tensors[region.name][key]
            tensors.setdefault(f"{region.name}/{key}", Boxes(shape, tensor.dtype)).add(region, tensor)
        boxes.read(self.folder / TENSORS, tensors, self.group)


class SavedByTorch:
    """The same of a file with a plain optimizer's ``state_dict()`` (optimizer.pt, optimizer.bin). It numbers the
    parameters group by group, in the order of the model that wrote it. Mapped into memory, read where asked for.

    Collective. Raises: SDPStateError when the file has other groups than ``optimizer``.
    """

    optimizer = None  # the file does not say

    def __init__(self, file: Path, optimizer: torch.optim.Optimizer, model: nn.Module):
        names_of_groups = _names_of_groups(optimizer, model)
        with together(control_group(model)):
            saved = self._load(file, names_of_groups)
        self.groups, self.numbers, self.tensors, self._values = [], {}, {}, {}
        for saved_group, names in zip(saved["param_groups"], names_of_groups, strict=True):
            self.groups.append({**saved_group, "params": names})
            for number, name in zip(saved_group["params"], names, strict=True):
                for key, value in saved["state"].get(number, {}).items():
                    if isinstance(value, torch.Tensor) and value.dim() > 0:
                        self.tensors.setdefault(name, {})[key] = (tuple(value.shape), value.dtype)
                        self._values[name, key] = value
                    else:
                        self.numbers.setdefault(name, {})[key] = value

    @staticmethod
    def _load(file: Path, names_of_groups: list[list[str]]) -> dict:
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:
            raise SDPStateError(f"{file} is cut short or not a plain optimizer's state: {error}") from error
        counts = [len(g["params"]) for g in saved.get("param_groups", [])]
        if counts != [len(names) for names in names_of_groups]:
            raise SDPStateError(
                f"{file} has parameter groups of {counts} parameters, this optimizer of {[len(n) for n in names_of_groups]}. "
                "It was written by another optimizer or for another model."
            )
        return saved

    def read(self, wanted: list[Wanted]) -> None:
        for region, key, tensor in wanted:
            tensor.copy_(region.of(self._values[region.name, key]))


def _names_of_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Full names in every param group over all workers, in the full model's order. Collective."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    stored = stored_parameters(model)
    mine = [list(dict.fromkeys(stored[p].name for p in g["params"])) for g in optimizer.param_groups]
    place = {name: i for i, name in enumerate(_order(model))}
    with together(control_group(model)):
        for names in mine:
            if sorted(names, key=place.__getitem__) != names:
                raise SDPStateError(
                    "A plain optimizer's state numbers the parameters; those of this optimizer are not in the model's order, so "
                    "it cannot be said which is which. Make the optimizer from model.parameters(), in their order."
                )
    everyone: list = [mine]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine, group=control_group(model))
    unions = [{name for theirs in everyone for name in theirs[i]} for i in range(len(mine))]
    return [[name for name in _order(model) if name in names] for names in unions]


@torch.no_grad()
def load_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, saved: SavedOptimizer | SavedByTorch) -> None:
    """Give a prepared ``optimizer`` the saved state of the regions it steps on. Collective.

    Options of a group (learning rate, weight decay, ...) come from the saved group that has its parameters, but for
    those that say how to compute a step (fused, foreach). Reads into the device's memory what stays there.

    ``saved`` must have passed :func:`check_optimizer`.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)
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
            if key not in ("params", *_OF_THIS_RUN):
                g[key] = _from_json(value, like=g.get(key)) if not isinstance(value, torch.Tensor) else value
    with local_shards(optimizer):
        optimizer.load_state_dict({"state": state, "param_groups": groups})


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, saved: SavedOptimizer | SavedByTorch) -> None:
    """Raises SDPStateError on every worker for state of another optimizer, model or grouping. Collective."""
    with together(control_group(model)):
        _check(getattr(optimizer, "optimizer", optimizer), model, saved)


def _check(optimizer: torch.optim.Optimizer, model: nn.Module, saved: SavedOptimizer | SavedByTorch) -> None:
    if saved.optimizer not in (None, type(optimizer).__name__):
        raise SDPStateError(
            f"The checkpoint has the state of {saved.optimizer}, this run trains with {type(optimizer).__name__}. "
            "Use the same optimizer, or start anew from the weights."
        )
    shapes = _order(model)
    for name, keys in saved.tensors.items():
        for key, (shape, _) in keys.items():
            if shape != tuple(shapes.get(name, ())):
                raise SDPStateError(
                    f"The checkpoint has {key} of shape {shape} for {name}, the model's is {shapes.get(name)}. "
                    "It is the state of another model."
                )
    saved_number = {name: i for i, g in enumerate(saved.groups) for name in g["params"]}
    stored = stored_parameters(model)
    for number, g in enumerate(optimizer.param_groups):
        found = {saved_number.get(stored[p].name) for p in g["params"]}
        if len(found) > 1 or None in found:
            missing = [stored[p].name for p in g["params"] if stored[p].name not in saved_number]
            raise SDPStateError(
                f"Parameter group {number} of this run is not one of the checkpoint's: its parameters were in groups "
                f"{sorted(found, key=str)}{f', {missing[:3]} in none' if missing else ''}. Make the optimizer as it was."
            )
