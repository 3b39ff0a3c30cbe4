"""``verify``: does the world still hold one consistent model?"""

import math

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import SDPStateError
from ..model.state import local_tensor
from ..world.agreement import of_everyone
from .presence import come_to
from .sharded import Sharded, get_sharded
from .statistics import average_statistics, statistics_differ


@torch.no_grad()
def verify(model: nn.Module) -> None:
    """Check plan and config on all workers, ownership of every element, and replicas bit for bit; running statistics of
    batch norms too, which are averaged before. Collective.

    Raises: SDPStateError on every worker with the first difference, in the order of ranks and parameters.
    """
    sharded = get_sharded(model, "verify")
    come_to(model, "verify")
    _raise_first([_same_plan(sharded), None])
    _raise_first([_everything_owned(sharded), _stores_what_it_should(sharded)])
    _raise_first(_replicas_equal(sharded))
    average_statistics(model, sharded)
    _raise_first([statistics_differ(model)])


def _raise_first(problems: list[str | None]) -> None:
    mine = next((p for p in problems if p), None)
    for rank, problem in enumerate(of_everyone(mine)):
        if problem:
            raise SDPStateError(f"rank {rank}: {problem}")


def _same_plan(sharded: Sharded) -> str | None:
    held = sharded.held
    everyone = of_everyone((held.plan.hash, str(held.config), sharded.run.version))
    for rank, other in enumerate(everyone):
        for what, a, b in zip(("plan", "config", "number of weight updates"), everyone[0], other, strict=True):
            if a != b:
                return f"{what} differs between rank 0 ({a}) and rank {rank} ({b})."
    return None


def _everything_owned(sharded: Sharded) -> str | None:
    for name, regions in sharded.held.owners.items():
        owned, full = sum(region.numel for _, region in regions), math.prod(sharded.held.plan.shapes[name])
        if owned != full:
            return f"{name}: {owned} of {full} elements have an owner."
    return None


def _stores_what_it_should(sharded: Sharded) -> str | None:
    for region, tensor in sharded.stored():
        if region.numel and region.shape != tuple(tensor.shape):
            return f"{region.name}: stores {tuple(tensor.shape)}, the plan says {region.shape}."
    return None


def _replicas_equal(sharded: Sharded) -> list[str | None]:
    problems: list[str | None] = []
    for local_name, parameter in sharded.parameters.items():
        if not isinstance(parameter, DTensor):
            continue
        for dim, placement in enumerate(parameter.placements):
            if not placement.is_replicate() or parameter.device_mesh.size(dim) == 1:
                continue
            group = parameter.device_mesh.get_group(dim)
            mine = local_tensor(parameter.detach()).contiguous()
            first = mine.clone()
            dist.broadcast(first, group=group, group_src=0)
            if not torch.equal(first.view(torch.uint8), mine.view(torch.uint8)):
                worst = (first.float() - mine.float()).abs().max().item()
                problems.append(f"{local_name}: replica differs from that of its first holder by up to {worst:g}.")
    return problems
