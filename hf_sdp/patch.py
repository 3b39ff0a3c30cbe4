"""``patch_model``: a full transformers model becomes one worker's subnetwork, in place."""

import dataclasses
import logging

import torch
import torch.distributed as dist
from torch import nn

from .checkpoint.adapters import SavesAdapters
from .checkpoint.save import SavesFullModel
from .config import SDPConfig
from .engine.presence import open_roll_call
from .errors import SDPConfigError
from .families import structure_of
from .families.adapters import adapters_in_use, is_peft_model, without_peft
from .model.backward_masking import mask_weight_gradients
from .model.changes import recorded
from .model.cut import cut
from .model.fitness import refuse_mixed_groups
from .model.forward import install_forward
from .model.mixin import mix_in
from .model.numbers import CountsFullAdapters, CountsFullModel, full_parameters
from .model.packed import let_storage_be_sharded
from .model.phases import Planned, Schedule
from .model.recomputation import recompute_as_the_phase_says, refuse_reordered_recomputation
from .model.simulation import simulate
from .model.state import Cursor, FullParameter, Held, Run, SDPState, difference, set_state
from .model.statistics import batch_norms
from .plan.placement import Placement
from .plan.subnetwork import Subnetwork, subnetwork_of, whole_model
from .plan.worker_graph import groups_that_share
from .preflight import preflight, tied_parameters
from .world.agreement import process_group_is_up, together

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
    rank, world_size, phases = preflight(model, config, rank, world_size, meta=False)
    parameters = full_parameters(without_peft(model))
    if not config.simulate:
        let_storage_be_sharded(without_peft(model))
        if process_group_is_up():
            _send_values_of_rank_0(without_peft(model))
    return _patch(model, config, rank, world_size, phases, parameters)


def patch_meta_model(model: nn.Module, config: SDPConfig, *, rank: int | None, world_size: int | None) -> nn.Module:
    """As :func:`patch_model`, for a model whose values come later (``pretrained.py``)."""
    agreed = preflight(model, config, rank, world_size, meta=True)
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
            tied=tied_parameters(base),
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
