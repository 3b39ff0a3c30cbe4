"""Whether a model type works: its subnetworks are compared with the dense model in which what they lack is zero."""

import torch
from transformers import PreTrainedConfig

from ...config import SDPConfig
from ...model.state import get_state
from ...patch import patch_model
from ...plan.plan import Plan
from ...planner import make_plan
from .tiny import tiny_batch, tiny_model

RANKS, WORLD = (0, 1), 2


class Differs(Exception):
    """A subnetwork does not compute what the dense model without the rest does."""


def check_gradients(config: PreTrainedConfig, task: str, sdp: SDPConfig, *, seed: int = 0) -> Plan:
    """The loss and each gradient of two subnetworks, against the dense model with what they do not hold zeroed.

    Under backward masking: each gradient against that of the dense model, times N/r where it is held, else zero.
    Raises: Differs; SDPConfigError when the model is not supported; what the model raises.
    """
    plan = make_plan(tiny_model(config, task, seed), sdp, WORLD)
    for rank in RANKS:
        dense = tiny_model(config, task, seed)
        batch = tiny_batch(dense)
        if sdp.masking == "forward":
            with torch.no_grad():
                for name, slices in plan.slices.items():
                    for s in slices:
                        if rank not in s.holders:
                            dense.get_parameter(name).narrow(s.dim, s.start, s.stop - s.start).zero_()
        torch.manual_seed(1)
        expected = dense(**batch, **_without_cache(dense))
        expected.loss.backward()
        model = patch_model(tiny_model(config, task, seed), sdp, rank=rank, world_size=WORLD)
        torch.manual_seed(1)
        found = model(**batch, **_without_cache(dense))
        found.loss.backward()
        _compare("the loss", found.loss, expected.loss)
        if sdp.masking == "forward" and sum(p.numel() for p in model.parameters()) != plan.numel(rank):
            raise Differs(
                f"rank {rank} has {sum(p.numel() for p in model.parameters())} elements, not {plan.numel(rank)}"
            )
        for local_name, p in model.named_parameters():
            region = get_state(model).held.subnetwork.tensors[local_name].region
            full = dense.get_parameter(region.name).grad
            if full is None:
                full = torch.zeros_like(dense.get_parameter(region.name))
            if sdp.masking == "backward":
                full = _masked(plan, region.name, full, rank)
            _compare(local_name, torch.zeros_like(p) if p.grad is None else p.grad, region.of(full))
    return plan


def _without_cache(model) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in model.forward.__code__.co_varnames else {}


def _masked(plan: Plan, name: str, full: torch.Tensor, rank: int) -> torch.Tensor:
    result = torch.zeros_like(full)
    for s in plan.slices[name]:
        if rank in s.holders:
            scale = plan.gradient_scale(s.holders)
            result.narrow(s.dim, s.start, s.stop - s.start).add_(scale * full.narrow(s.dim, s.start, s.stop - s.start))
    return result


def _compare(what: str, found: torch.Tensor, expected: torch.Tensor) -> None:
    try:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)
    except AssertionError as error:
        raise Differs(f"{what}: {str(error).splitlines()[2] if len(str(error).splitlines()) > 2 else error}") from None
