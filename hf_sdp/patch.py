"""``patch_model``: a full transformers model becomes one worker's subnetwork, in place."""

import dataclasses
import logging
import os

import torch
import torch.distributed as dist
from torch import nn

from .checkpoint.adapters import SavesAdapters, refuse_what_is_not_saved
from .checkpoint.save import SavesFullModel
from .config import MAX_WORLD, SDPConfig
from .engine.presence import open_roll_call
from .errors import SDPConfigError
from .families import structure_of
from .families.adapters import adapters_in_use, is_peft_model, without_peft
from .families.model_config import architecture
from .model.backward_masking import mask_weight_gradients
from .model.changes import recorded
from .model.cut import cut
from .model.fitness import (
    refuse_adapters,
    refuse_layers_at_random,
    refuse_mixed_groups,
    refuse_unlike_its_config,
    refuse_what_fsdp_refuses,
    refuse_what_is_no_model,
)
from .model.forward import install_forward
from .model.mixin import mix_in
from .model.numbers import CountsFullAdapters, CountsFullModel, full_parameters
from .model.packed import is_packed, let_storage_be_sharded, refuse_quantized
from .model.phases import Planned, Schedule
from .model.recomputation import (
    recompute_as_the_phase_says,
    refuse_reentrant_checkpointing,
    refuse_reordered_recomputation,
)
from .model.simulation import simulate
from .model.state import Cursor, FullParameter, Held, Run, SDPState, difference, find_state, set_state
from .model.statistics import batch_norms, refuse_cast_norms, refuse_options_of_norms, refuse_synced_norms
from .plan.placement import Placement
from .plan.subnetwork import Subnetwork, subnetwork_of, whole_model
from .plan.worker_graph import groups_that_share
from .planner import make_plans, num_subnetworks_of, refuse_what_is_no_config
from .world.agreement import agree, launched_workers, process_group_is_up, together

logger = logging.getLogger(__name__)


def patch_model(
    model: nn.Module, config: SDPConfig, *, rank: int | None = None, world_size: int | None = None
) -> nn.Module:
    """Reduce a full model to the subnetwork of this worker, in place, and return it.

    Tensors become physically smaller: with forward masking this worker keeps only the slices it holds. With backward
    masking all values stay until the engine shards them over the world, and linear layers learn only held slices.

    Args:
        model: a transformers model with all its values (not on the meta device), not patched, not wrapped.
            Or a model of PEFT around one: its LoRA adapters are cut with the layers that they adapt.
        config: what to hold. With ``config.simulate`` the model stays whole and trains N virtual workers in turn.
        rank, world_size: only without a process group; with one they are taken from it.
    Raises: SDPConfigError on every worker, before anything is changed.
    Collective when a process group is up: rank 0's full values are sent to all workers tensor by tensor, so that
        different seeds do not matter.
    """
    rank, world_size, phases = _agree(model, config, rank, world_size, meta=False)
    parameters = full_parameters(without_peft(model))
    if not config.simulate:
        let_storage_be_sharded(without_peft(model))
        if process_group_is_up():
            _send_values_of_rank_0(without_peft(model))
    return _patch(model, config, rank, world_size, phases, parameters)


def patch_meta_model(model: nn.Module, config: SDPConfig, *, rank: int | None, world_size: int | None) -> nn.Module:
    """As :func:`patch_model`, for a model whose values come later (``pretrained.py``)."""
    agreed = _agree(model, config, rank, world_size, meta=True)
    return _patch(model, config, *agreed, full_parameters(without_peft(model)))


def _patch(
    model: nn.Module,
    config: SDPConfig,
    rank: int,
    world_size: int,
    phases: tuple[Planned, ...],
    parameters: dict[str, FullParameter],
) -> nn.Module:
    """``parameters``: as they were before anything was changed."""
    with together():
        base, first = without_peft(model), phases[0]
        held = Held(
            config=first.config,
            plan=first.plan,
            rank=rank,
            placement=Placement(world_size, first.plan.num_subnetworks, config.sharding),
            structure=structure_of(base),
            subnetwork=_subnetwork(first, rank),
            model_class=type(base),
            model_name=type(base).__name__,
            full_config=base.config,
            parameters=parameters,
            tied=_tied(base),
            adapters=adapters_in_use(base),
        )
        for planned in phases:  # those that come later, too
            _refuse_phase(base, held, planned)
        if config.coverage_schedule is None:
            _reduce(base, held, None)
        else:
            become_subnetwork(base, held, Schedule(config, phases))
        if is_peft_model(model):
            mix_in(model, SavesAdapters, CountsFullAdapters)
    open_roll_call(model)
    return model


def become_subnetwork(model: nn.Module, held: Held, schedule: Schedule) -> None:
    """The full model becomes what it is in the current phase of ``schedule``, in place.

    ``held``: of the phase before, or of this one.
    """
    with recorded(model) as changes:
        _reduce(model, _in_phase(held, schedule.current), schedule)
    schedule.changes.append(changes)
    recompute_as_the_phase_says(model, schedule)


def _in_phase(held: Held, planned: Planned) -> Held:
    subnetwork = _subnetwork(planned, held.rank)
    return dataclasses.replace(held, config=planned.config, plan=planned.plan, subnetwork=subnetwork)


def _refuse_phase(model: nn.Module, held: Held, planned: Planned) -> None:
    """What would fail in a phase fails before the training. Raises SDPConfigError."""
    if not held.simulated:
        refuse_mixed_groups(model, _in_phase(held, planned))
    if planned.phase.gradient_checkpointing:
        refuse_reordered_recomputation(planned.config, planned.plan)
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise SDPConfigError(f"gradient_checkpointing of a phase: {type(model).__name__} does not support it.")


def _subnetwork(phase: Planned, rank: int) -> Subnetwork:
    is_cut = phase.config.masking == "forward" and not phase.config.simulate
    return subnetwork_of(phase.plan, rank % phase.plan.num_subnetworks) if is_cut else whole_model(phase.plan)


def _reduce(model: nn.Module, held: Held, schedule: Schedule | None) -> None:
    named = dict(model.named_parameters())
    config, plan, index = held.config, held.plan, held.index
    run = Run(Cursor(index, trains=model.training), held.evaluates_full)
    if config.simulate:
        average_shared = config.average_shared_statistics
        run.hooks = simulate(model, plan, held.structure, run.cursor, average_shared=average_shared)
    elif config.masking == "backward":
        mask_weight_gradients(model, plan, run.cursor, [index])
    else:
        cut(model, held.subnetwork, held.structure, run)
    problem = difference(model, held)
    if problem:
        raise AssertionError(problem)
    for name, parameter in named.items():  # an optimizer made before patching refers to the full parameters
        run.replaced[parameter] = held.subnetwork.local_names[name]
    if held.rank == 0:
        _warn_of_statistics(model, held)
        _warn_of_units_apart(held)
    set_state(model, SDPState(held, run, schedule))
    install_forward(model, *(() if config.simulate else (SavesFullModel, CountsFullModel)))


def _warn_of_statistics(model: nn.Module, held: Held) -> None:
    config = held.config
    if config.masking == "forward" and not held.plan.is_full and config.evaluate == "full" and batch_norms(model):
        if config.recalibrate_batches is None:
            logger.warning(
                f"{held.model_name} has batch norms. Their running statistics are those of subnetworks, and the full "
                "model that is evaluated and saved with them may be far worse than it is. With the Trainer use "
                "SDPConfig(recalibrate_batches=...), else call hf_sdp.recalibrate before each evaluation."
            )


def _warn_of_units_apart(held: Held) -> None:
    groups = groups_that_share(held.plan)
    if len(groups) > 1:
        logger.warning(
            f"{held.model_name}: at coverage {held.plan.coverage:.3g} of {held.plan.num_subnetworks} subnetworks there "
            f"are {len(groups)} groups that share no unit, so a unit learns from the batches of its group alone. A "
            "higher coverage or more workers connect them (hf-sdp plan shows it)."
        )


def _agree(
    model: nn.Module, config: SDPConfig, rank: int | None, world_size: int | None, *, meta: bool
) -> tuple[int, int, tuple[Planned, ...]]:
    """Rank, world size and the phases with their plans, after all checks. Collective when a process group is up: what
    is wrong on one worker is an error on all, and every worker must have the same model (its values aside) and the same
    config."""
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
        "the model": {"class": type(model).__name__, "tied": sorted(_tied(model).items())},
        "the model's config": architecture(model.config),
    }
    for name, p in model.named_parameters():
        result[f"parameter {name}"] = {**_kind_of(p), "requires_grad": p.requires_grad}
    for name, buffer in model.named_buffers():
        result[f"buffer {name}"] = _kind_of(buffer)
    return result


def _kind_of(tensor: torch.Tensor) -> dict[str, object]:
    return {"shape": tuple(tensor.shape), "dtype": tensor.dtype, "device": tensor.device.type}


def _tied(model: nn.Module) -> dict[str, str]:
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


def _send_values_of_rank_0(model: nn.Module) -> None:
    cpu_works = "cpu:" in dist.get_backend_config() or dist.get_backend() in ("gloo", "fake", "mpi")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and not cpu_works:
                staged = tensor.to(torch.device("cuda", torch.cuda.current_device()))
                dist.broadcast(staged, src=0)
                tensor.copy_(staged)
            else:
                dist.broadcast(tensor.data, src=0)
