"""All that is looked at before a model is patched: its fitness, the world, and whether all workers have the same."""

import os

import torch
import torch.distributed as dist
from torch import nn

from .checkpoint.adapters import refuse_what_is_not_saved
from .config import MAX_WORLD, SDPConfig
from .errors import SDPConfigError
from .families.adapters import is_peft_model, without_peft
from .families.model_config import architecture
from .model.fitness import (
    refuse_adapters,
    refuse_layers_at_random,
    refuse_unlike_its_config,
    refuse_what_fsdp_refuses,
    refuse_what_is_no_model,
)
from .model.packed import is_packed, refuse_quantized
from .model.phases import Planned
from .model.recomputation import refuse_reentrant_checkpointing
from .model.state import find_state
from .model.statistics import batch_norms, refuse_cast_norms, refuse_options_of_norms, refuse_synced_norms
from .planner import make_plans, num_subnetworks_of, refuse_what_is_no_config
from .world.agreement import agree, launched_workers, process_group_is_up, together


def preflight(
    model: nn.Module, config: SDPConfig, rank: int | None, world_size: int | None, *, meta: bool
) -> tuple[int, int, tuple[Planned, ...]]:
    """Rank, world size and the phases with their plans, after all checks. Nothing is changed.

    ``meta``: whether the model may be on the meta device. Other arguments: as of :func:`hf_sdp.patch_model`.
    Collective when a process group is up.
    Raises: SDPConfigError on every worker: what is wrong on one of them is an error on all, and all must have the same
        model (its values aside) and the same config.
    """
    with together():
        refuse_what_is_no_config(config)
        rank, world_size = _resolve_world(config, rank, world_size)
        phases = make_plans(model, config, _check(model, config, world_size, meta))
        hashes = [phase.plan.hash for phase in phases]
        same = {"the SDPConfig": vars(config), **_description(without_peft(model)), "the plan": {"hash": hashes}}
    agree(same, "Give every worker the same model and SDPConfig.")
    return rank, world_size, phases


def _description(model: nn.Module) -> dict[str, dict[str, object]]:
    """What must be the same on all workers: what is compared -> key -> value."""
    result: dict[str, dict[str, object]] = {
        "the model": {"class": type(model).__name__, "tied": sorted(tied_parameters(model).items())},
        "the model's config": architecture(model.config),
    }
    for name, p in model.named_parameters():
        result[f"parameter {name}"] = {**_kind_of(p), "requires_grad": p.requires_grad}
    for name, buffer in model.named_buffers():
        result[f"buffer {name}"] = _kind_of(buffer)
    return result


def _kind_of(tensor: torch.Tensor) -> dict[str, object]:
    return {"shape": tuple(tensor.shape), "dtype": tensor.dtype, "device": tensor.device.type}


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Alias -> name of parameters that have several."""
    names = {id(p): name for name, p in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {alias: names[id(p)] for alias, p in every if alias != names[id(p)]}


def _resolve_world(config: SDPConfig, rank: int | None, world_size: int | None) -> tuple[int, int]:
    launched = launched_workers()
    if process_group_is_up():
        actual = (dist.get_rank(), dist.get_world_size())
        if (rank, world_size) not in ((None, None), actual):
            raise SDPConfigError(
                f"rank={rank}, world_size={world_size} contradict the process group (rank {actual[0]} of {actual[1]}). "
                "Leave them out."
            )
        rank, world_size = actual
    elif rank is None and world_size is None:
        if launched > 1 or not config.simulate:
            raise SDPConfigError(
                f"No process group is up (WORLD_SIZE={os.environ.get('WORLD_SIZE', 'not set')}). Create "
                "TrainingArguments or an Accelerator before patch_model, launch with one of "
                "configs/accelerate/*.yaml, or pass rank and world_size; for one process use SDPConfig(simulate=N)."
            )
        rank, world_size = 0, 1
    elif type(rank) is not int or type(world_size) is not int or not 0 <= rank < world_size <= MAX_WORLD:
        raise SDPConfigError(
            "rank and world_size must be given together, as integers with 0 <= rank < world_size <= "
            f"{MAX_WORLD}, got {rank!r}, {world_size!r}."
        )
    if process_group_is_up() and launched not in (1, world_size):
        raise SDPConfigError(f"WORLD_SIZE={launched} was launched but the process group has {world_size} workers.")
    if config.simulate and world_size > 1:
        raise SDPConfigError(
            f"simulate={config.simulate} runs virtual workers in one process, but {world_size} workers were launched. "
            "Leave simulate out, or launch one process."
        )
    if world_size == 1 and not config.simulate:
        raise SDPConfigError(
            "SDP needs at least 2 workers, the world has 1. `accelerate launch --cpu --num_processes N` starts one "
            "process: use a file of configs/accelerate/ instead, or SDPConfig(simulate=N) to train N virtual workers."
        )
    return rank, world_size


def _check(model: nn.Module, config: SDPConfig, world_size: int, meta: bool) -> int:
    """All checks of the model. Returns the number of subnetworks."""
    if find_state(model) is not None:
        raise SDPConfigError("This model is already patched. Patch a newly made model.")
    refuse_what_is_no_model(model)
    refuse_adapters(model)
    is_adapted = is_peft_model(model)
    if is_adapted:
        refuse_what_is_not_saved(model)
    model = without_peft(model)
    for _, of_phase in config.phases:
        refuse_quantized(model, of_phase, is_adapted=is_adapted)
    for name, p in model.named_parameters():
        if p.is_meta and not meta:
            raise SDPConfigError(
                f"{name} is on the meta device: there are no values to keep. Use hf_sdp.from_pretrained or "
                "from_config, or load or initialize the model."
            )
        if not config.simulate and (p._backward_hooks or p._post_accumulate_grad_hooks):
            raise SDPConfigError(
                f"{name} has a hook for its gradient. Patching and sharding make new parameters, on which it would "
                "never be called. Register it after the model has been prepared."
            )
        if type(p) is not nn.Parameter and not is_packed(p):
            raise SDPConfigError(f"{name} is a {type(p).__name__}: the model is already sharded. Patch it before.")
    refuse_unlike_its_config(model)
    if not config.simulate:
        refuse_what_fsdp_refuses(model)
        refuse_layers_at_random(model)
        refuse_cast_norms(model, config.param_dtype)
        if any(of_phase.masking == "forward" for _, of_phase in config.phases):
            refuse_synced_norms(model)
    refuse_reentrant_checkpointing(model)
    if not batch_norms(model):
        refuse_options_of_norms(config, type(model).__name__)
    return config.simulate or num_subnetworks_of(config, world_size)
