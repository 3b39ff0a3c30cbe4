"""``verify``: does the world still hold one consistent model?"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import SDPStateError
from ..model.state import SDPState, get_state, local_tensor, unwrap
from .placement import full_box, local_box, numel, owned_boxes


@torch.no_grad()
def verify(model: nn.Module) -> None:
    """Check plan and config on all workers, ownership of every element, and replicas bit for bit. Collective.

    Raises: SDPStateError on every worker with the first difference, in the order of ranks and parameters.
    """
    model = unwrap(model)
    state = get_state(model)
    if not state.sharded:
        raise SDPStateError("verify needs a prepared model.")
    _raise_first([_same_plan(state), None])
    _raise_first([_everything_owned(state), _stores_what_it_should(state)])
    _raise_first(_replicas_equal(state))


def _raise_first(problems: list[str | None]) -> None:
    mine = next((p for p in problems if p), None)
    everyone: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    for rank, problem in enumerate(everyone):
        if problem:
            raise SDPStateError(f"rank {rank}: {problem}")


def _same_plan(state: SDPState) -> str | None:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (state.plan.hash, str(state.config), state.version))
    for rank, other in enumerate(everyone):
        for what, a, b in zip(("plan", "config", "number of weight updates"), everyone[0], other, strict=True):
            if a != b:
                return f"{what} differs between rank 0 ({a}) and rank {rank} ({b})."
    return None


def _everything_owned(state: SDPState) -> str | None:
    for name, pieces in owned_boxes(state).items():
        owned, full = sum(numel(box) for _, box in pieces), numel(full_box(state.plan.shapes[name]))
        if owned != full:
            return f"{name}: {owned} of {full} elements have an owner."
    return None


def _stores_what_it_should(state: SDPState) -> str | None:
    for local_name, parameter in state.parameters.items():
        expected = tuple(stop - start for start, stop in local_box(state, state.held[local_name]))
        stored = tuple(local_tensor(parameter.detach()).shape)
        if stored != expected and numel(local_box(state, state.held[local_name])):
            return f"{local_name}: stores {stored}, the plan says {expected}."
    return None


def _replicas_equal(state: SDPState) -> list[str | None]:
    problems = []
    for local_name, parameter in state.parameters.items():
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
