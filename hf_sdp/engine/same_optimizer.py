"""Optimizers are made on each worker; all of them have to be the same one."""

import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..errors import SDPConfigError
from ..world.agreement import agree, raised_by_all
from .sharded import Sharded

_HOW_TO_STEP = ("params", "foreach", "fused", "capturable", "differentiable")


def agree_on_options(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raises SDPConfigError on every worker unless all have optimizers of the same classes, with the same options in
    the same order (learning rate, weight decay, ...). Neighbouring groups of equal options count as one: the Trainer
    makes a group for each mesh, and workers have other meshes. Collective."""
    things: dict[str, dict[str, object]] = {"the optimizers": {"number": len(optimizers)}}
    for index, optimizer in enumerate(optimizers):
        what = f"optimizer {index}"
        distinct = [options for options, _ in itertools.groupby(map(options_of, optimizer.param_groups))]
        things[what] = {"class": type(optimizer).__qualname__, "number of groups": len(distinct)}
        things |= {f"group {number} of {what}": options for number, options in enumerate(distinct)}
    agree(things, "Make the same optimizer on every worker.")


def options_of(group: dict) -> dict[str, object]:
    return {key: _plain(value) for key, value in group.items() if key not in _HOW_TO_STEP}


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value if isinstance(value, (int, float, str, tuple, list, type(None))) else type(value).__name__


def agree_on_groups(
    optimizer: torch.optim.Optimizer, groups: Sequence[Sequence[nn.Parameter]], sharded: Sharded
) -> None:
    """The same for the parameters of each group: what several workers hold must have one group's options on all.

    No worker has all parameters: the highest and the lowest number that anybody gives to each are compared. Collective
    on the control group.

    Args:
        groups: the parameters that each group of the optimizer is going to train.
    """
    if sharded.control_group is None:
        return
    tensors = sharded.held.subnetwork.tensors
    full_name = {p: tensors[name].region.name for name, p in sharded.parameters.items()}
    alike = itertools.groupby(zip(optimizer.param_groups, groups, strict=True), lambda pair: options_of(pair[0]))
    number_of = {full_name[p]: number for number, (_, pairs) in enumerate(alike) for _, group in pairs for p in group}
    held, not_held, in_none = set(full_name.values()), [torch.iinfo(torch.int64).min] * 2, -1
    mine = torch.tensor(
        [
            [number_of.get(name, in_none), -number_of.get(name, in_none)] if name in held else not_held
            for name in sharded.held.plan.shapes
        ]
    )
    dist.all_reduce(mine, op=dist.ReduceOp.MAX, group=sharded.control_group)
    for name, (highest, lowest) in zip(sharded.held.plan.shapes, mine.tolist(), strict=True):
        if highest != -lowest:
            lower, higher = (f"in group {n}" if n >= 0 else "in none" for n in (-lowest, highest))
            raise raised_by_all(
                SDPConfigError(
                    f"Workers disagree on the optimizer: {name} is {lower} on some, {higher} on others. Make the same "
                    "optimizer on every worker."
                )
            )
