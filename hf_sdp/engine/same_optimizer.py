"""Optimizers are made on each worker; all of them have to be the same one."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from ..errors import SDPConfigError
from ..world.agreement import agree, raised_by_all
from .sharded import Sharded

OF_THIS_WORKER = ("params", "param_names")
"""Keys of a param group of which every worker has its own."""
HOW_TO_STEP = ("foreach", "fused", "capturable", "differentiable")
"""Options of a param group that do not decide what a step computes."""


def agree_on_options(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    """Raises SDPConfigError on every worker unless all have optimizers of the same classes, with the same groups of the
    same options (learning rate, weight decay, ...). Collective."""
    things: dict[str, dict[str, object]] = {"the optimizers": {"number": len(optimizers)}}
    for index, optimizer in enumerate(optimizers):
        what = f"optimizer {index}"
        groups = optimizer.param_groups
        things[what] = {"class": type(optimizer).__qualname__, "number of groups": len(groups)}
        things |= {f"group {number} of {what}": _options_of(group) for number, group in enumerate(groups)}
    agree(things, "Make the same optimizer on every worker.")


def _options_of(group: dict) -> dict[str, object]:
    return {key: _plain(value) for key, value in group.items() if key not in (*OF_THIS_WORKER, *HOW_TO_STEP)}


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return value.tolist()
    return value if isinstance(value, (int, float, str, tuple, list, type(None))) else type(value).__name__


def agree_on_groups(groups: Sequence[Sequence[nn.Parameter]], sharded: Sharded) -> None:
    """The same for the parameters of each group: what several workers hold must be in one group on all.

    No worker has all parameters: the highest and the lowest number that anybody gives to each are compared. Collective
    on the control group.

    Args:
        groups: the parameters that each group of an optimizer is going to train.
    """
    if sharded.control_group is None:
        return
    tensors = sharded.held.subnetwork.tensors
    full_name = {p: tensors[name].region.name for name, p in sharded.parameters.items()}
    number_of = {p: number for number, group in enumerate(groups) for p in group}
    not_held, in_none = [torch.iinfo(torch.int64).min] * 2, -1
    found: dict[str, list[int]] = dict.fromkeys(sharded.held.plan.shapes, not_held)
    for p, name in full_name.items():
        number = number_of.get(p, in_none)
        highest, minus_lowest = found[name]
        found[name] = [max(highest, number), max(minus_lowest, -number)]
    mine = torch.tensor(list(found.values()))
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
