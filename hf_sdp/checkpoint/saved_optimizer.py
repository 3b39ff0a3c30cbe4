"""Optimizer state that has been saved, by SDP or by a plain optimizer: opened, and read by region."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..engine.optimizer import inner_optimizer
from ..engine.sharded import control_group
from ..errors import SDPStateError
from ..plan.region import Region
from ..world.agreement import of_everyone, together
from . import tensors as boxes
from .files import read_json, reading
from .stored import full_shapes, stored_parameters
from .tensors import Boxes

TENSORS, GROUPS = "tensors", "groups.json"


class Wanted(NamedTuple):
    """State to be read: the tensor ``key`` of a region, and where it goes, of the region's shape."""

    region: Region
    key: str
    tensor: torch.Tensor


def from_json(value, like=None):
    if isinstance(value, dict):
        return torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]))
    if isinstance(value, list):
        return tuple(from_json(v) for v in value) if not isinstance(like, list) else [from_json(v) for v in value]
    if isinstance(like, torch.Tensor):  # lr as a tensor (capturable)
        return torch.full_like(like, value)
    return value


def _read_groups(file: Path) -> dict:
    """The content of ``groups.json``. Raises: SDPStateError that names the file, and what in it is of a wrong type."""
    content = read_json(file)

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise SDPStateError(f"{file} is damaged: {what}.")

    need(isinstance(content, dict), "it is no dict")
    for key, kind in {"optimizer": str, "groups": list, "numbers": dict}.items():
        need(isinstance(content.get(key), kind), f"{key!r} is missing, or no {kind.__name__}")
    for number, group in enumerate(content["groups"]):
        need(isinstance(group, dict), f"group {number} is no dict")
        names = group.get("params")
        named = isinstance(names, list) and all(isinstance(name, str) for name in names)
        need(named, f"'params' of group {number} is no list of names")
        for key, value in group.items():
            need(_is_value(value), f"{key!r} of group {number} is {value!r}")
    for name, numbers in content["numbers"].items():
        need(isinstance(numbers, dict), f"the numbers of {name} are {numbers!r}")
        for key, value in numbers.items():
            need(_is_value(value), f"{key!r} of {name} is {value!r}")
    return content


def _is_value(value) -> bool:
    """Whether it is something that ``save_optimizer`` writes."""
    if isinstance(value, dict):
        dtype = value.get("dtype")
        known = isinstance(dtype, str) and isinstance(getattr(torch, dtype, None), torch.dtype)
        return known and isinstance(value.get("value"), (bool, int, float))
    return all(map(_is_value, value)) if isinstance(value, list) else True


class SavedOptimizer:
    """State written by :func:`save_optimizer`.

    Attributes: ``optimizer`` (class name), ``groups`` (options and ``params`` by full name), ``numbers`` (full name ->
    key -> value), ``tensors`` (full name -> key -> ``(shape, dtype)``).
    """

    def __init__(self, folder: Path, model: nn.Module):
        self.folder, self.group = folder, control_group(model)
        content = _read_groups(folder / GROUPS)
        self.optimizer, self.groups = content["optimizer"], content["groups"]
        self.numbers = {n: {k: from_json(v) for k, v in s.items()} for n, s in content["numbers"].items()}
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
        self.groups: list[dict] = []
        self.numbers: dict[str, dict] = {}
        self.tensors: dict[str, dict[str, tuple]] = {}
        self._values: dict[tuple[str, str], torch.Tensor] = {}
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
        with reading(file):
            open(file, "rb").close()  # a file without permission is no damaged one
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            counts = [len(g["params"]) for g in saved["param_groups"]]
            saved["state"].get(0, {}).items()
        except Exception as error:  # whatever is in it instead
            raise SDPStateError(f"{file} is cut short or not a plain optimizer's state: {error!r}") from error
        if counts != [len(names) for names in names_of_groups]:
            raise SDPStateError(
                f"{file} has parameter groups of {counts} parameters, "
                f"this optimizer of {[len(n) for n in names_of_groups]}. "
                "It was written by another optimizer or for another model."
            )
        return saved

    def read(self, wanted: list[Wanted]) -> None:
        for region, key, tensor in wanted:
            tensor.copy_(region.of(self._values[region.name, key]))


def _names_of_groups(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
    """Full names in every param group over all workers, in the full model's order. Collective."""
    optimizer = inner_optimizer(optimizer)
    stored = stored_parameters(model)
    mine = [list(dict.fromkeys(stored[p].name for p in g["params"])) for g in optimizer.param_groups]
    place = {name: i for i, name in enumerate(full_shapes(model))}
    with together(control_group(model)):
        for names in mine:
            if sorted(names, key=place.__getitem__) != names:
                raise SDPStateError(
                    "A plain optimizer's state numbers the parameters; those of this optimizer are not in the model's "
                    "order, so it cannot be said which is which. Make the optimizer from model.parameters(), in their "
                    "order."
                )
    everyone = of_everyone(mine, control_group(model))
    unions = [{name for theirs in everyone for name in theirs[i]} for i in range(len(mine))]
    return [[name for name in full_shapes(model) if name in names] for names in unions]
