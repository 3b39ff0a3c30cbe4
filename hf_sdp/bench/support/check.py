"""Whether a model type works: its subnetworks are compared with the dense model without what they do not hold.

What is left out of the dense model is left out by other means than in a subnetwork: its parameters are zero, or the
layer's output is put aside for its input.
"""

import functools
import inspect
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel

from ...config import SDPConfig
from ...model.state import get_state
from ...model.statistics import batch_norms
from ...patch import patch_model
from ...plan.plan import Plan
from ...planner import make_plan
from .models import tiny_batch, tiny_model

RELATIVE, ABSOLUTE = 1e-4, 1e-6
"""Of the norm of a gradient, and of the loss."""


class Differs(Exception):
    """A subnetwork does not compute what the dense model without the rest does."""


@dataclass(frozen=True)
class _Learned:
    """A loss, and the gradient of each parameter that has one."""

    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def check(
    config: PreTrainedConfig,
    task: str,
    sdp: SDPConfig,
    *,
    world: int = 2,
    ranks: tuple[int, ...] = (),
    batch: dict[str, torch.Tensor] | None = None,
) -> Plan:
    """Loss and gradients of subnetworks, and of virtual workers, against those of the dense model.

    Under forward masking: of the dense model without what they do not hold. Under backward masking the loss is the
    dense one, and gradients are those of the dense model times N/r where it is held, else zero. A virtual worker has
    the loss of its subnetwork; its gradients are multiplied by N/r under both.

    Args:
        task: one of ``TASKS``.
        ranks: those that are compared; all by default.
        batch: what is learned; that of ``tiny_batch`` by default.
    Returns: the plan.
    Raises: Differs; SDPConfigError when the model is not supported; what the model raises.
    """
    make = functools.partial(_model, config, task)
    batch = batch or tiny_batch(make(), task=task)
    plan = make_plan(make(), sdp, world)
    simulated = patch_model(make(), SDPConfig(**_choices(sdp), simulate=world))
    for rank in range(world):
        virtual = learn(simulated, batch)
        if ranks and rank not in ranks:
            continue
        dense = make()
        if sdp.masking == "forward":
            leave_out(dense, plan, rank)
        expected = learn(dense, batch)
        held = {name: _held(plan, name, p, expected, rank) for name, p in dense.named_parameters()}
        _compare(f"rank {rank}, the loss", virtual.loss, expected.loss, simulated=True)
        for name, p in simulated.named_parameters():
            found = virtual.gradients.get(name, torch.zeros_like(p))
            _compare(f"rank {rank}, {name}", found, held[name], simulated=True)
        model = patch_model(make(), sdp, rank=rank, world_size=world)
        found_all = learn(model, batch)
        _compare(f"rank {rank}, the loss", found_all.loss, expected.loss)
        _check_size(model, plan, rank)
        for local_name, p in model.named_parameters():
            region = get_state(model).held.subnetwork.tensors[local_name].region
            full = held[region.name]
            if sdp.masking == "forward":
                full = expected.gradients.get(region.name, torch.zeros_like(full))
            found = found_all.gradients.get(local_name, torch.zeros_like(p))
            _compare(f"rank {rank}, {local_name}", found, region.of(full))
    return plan


def _model(config: PreTrainedConfig, task: str) -> PreTrainedModel:
    """In double precision where there are batch norms: many gradients are sums of large numbers that cancel out."""
    model = tiny_model(config, task)
    return model.double() if batch_norms(model) else model


def leave_out(dense: PreTrainedModel, plan: Plan, rank: int) -> None:
    """Make a full model compute what it would without what subnetwork ``rank`` does not hold, in place."""
    for module in plan.modules:
        if module.kind == "layer" and rank not in plan.unit_holders[module.name][0]:
            dense.get_submodule(module.name).register_forward_hook(_pass_on, with_kwargs=True)
    with torch.no_grad():
        for name, slices in plan.slices.items():
            for s in slices:
                if rank not in s.holders:
                    dense.get_parameter(name).narrow(s.dim, s.start, s.stop - s.start).zero_()


def _pass_on(layer: nn.Module, args, kwargs, output):
    stream = next(value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor))
    return (stream, *output[1:]) if isinstance(output, (tuple, list)) else stream


def _choices(sdp: SDPConfig) -> dict:
    names = ("level", "masking", "coverage", "block_granularity", "seed")
    return {name: getattr(sdp, name) for name in names}


def learn(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> _Learned:
    """One forward and backward, of the next subnetwork if it is simulated."""
    dtype = next(model.parameters()).dtype
    batch = {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}
    # The full model would make a cache, and compute otherwise with it.
    has_cache = "use_cache" in inspect.signature(type(model).forward).parameters
    without_cache = {"use_cache": False} if has_cache else {}
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(**batch, **without_cache).loss
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return _Learned(loss.detach(), gradients)


def _held(plan: Plan, name: str, p: torch.Tensor, dense: _Learned, rank: int) -> torch.Tensor:
    """The gradient of a full parameter, times N/r where it is held, else zero."""
    result = torch.zeros_like(p)
    full = dense.gradients.get(name, result)
    for s in plan.slices[name]:
        if rank in s.holders:
            own = full.narrow(s.dim, s.start, s.stop - s.start) if p.dim() else full
            (result.narrow(s.dim, s.start, s.stop - s.start) if p.dim() else result).add_(
                own, alpha=plan.gradient_scale(s.holders)
            )
    return result.detach()


def _check_size(model: nn.Module, plan: Plan, rank: int) -> None:
    found = sum(p.numel() for p in model.parameters())
    expected = plan.numel(rank) if plan.masking == "forward" else plan.full_numel
    if found != expected:
        raise Differs(f"rank {rank} has {found} elements, not {expected}")


def _compare(what: str, found: torch.Tensor, expected: torch.Tensor, *, simulated: bool = False) -> None:
    error, norm = float((found - expected).norm()), float(expected.norm())
    if not error <= RELATIVE * norm + ABSOLUTE:
        simulation = " in the simulation" if simulated else ""
        raise Differs(f"{what} differs by {error:.2g} of {norm:.2g}{simulation}")
