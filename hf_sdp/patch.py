"""``patch_model``: a full transformers model becomes one worker's subnetwork, in place."""

import os
import re

import torch
import torch.distributed as dist
from torch import nn

from .config import SDPConfig
from .errors import SDPConfigError
from .families import family_of
from .model.backward_masking import mask_weight_gradients
from .model.layers import SKIPPED, PartSum, narrow_module
from .model.methods import install, refuse_reentrant_checkpointing
from .model.simulation import simulate
from .model.state import Held, LocalPart, SDPState, find_state, set_state
from .plan.plan import Plan
from .planner import make_plan
from .world.agreement import process_group_is_up, raise_together


def patch_model(
    model: nn.Module, config: SDPConfig, *, rank: int | None = None, world_size: int | None = None
) -> nn.Module:
    """Reduce a full model to the subnetwork of this worker, in place, and return it.

    Tensors become physically smaller: with forward masking this worker keeps only the slices it holds. With backward
    masking all values stay until the engine shards them over the world, and linear layers learn only held slices.

    Args:
        model: a transformers model with all its values (not on the meta device), not patched, not wrapped.
        config: what to hold. With ``config.simulate`` the model stays whole and trains N virtual workers in turn.
        rank, world_size: only without a process group; with one they are taken from it.
    Raises: SDPConfigError on every worker, before anything is changed.
    Collective when a process group is up: rank 0's full values are sent to all workers tensor by tensor, so that
        different seeds do not matter.
    """
    rank, world_size, plan = _agree(model, config, rank, world_size, meta=False)
    if process_group_is_up() and not config.simulate:
        _send_values_of_rank_0(model)
    return _patch(model, config, rank, world_size, plan)


def patch_meta_model(model: nn.Module, config: SDPConfig, *, rank: int | None, world_size: int | None) -> nn.Module:
    """As :func:`patch_model`, for a model whose values come later (``loading.py``)."""
    return _patch(model, config, *_agree(model, config, rank, world_size, meta=True))


def _patch(model: nn.Module, config: SDPConfig, rank: int, world_size: int, plan: Plan) -> nn.Module:
    named = dict(model.named_parameters())
    names = {id(p): name for name, p in named.items()}
    state = SDPState(
        config=config,
        plan=plan,
        rank=rank,
        world_size=world_size,
        model_class=type(model),
        model_name=type(model).__name__,
        full_config=model.config,
        tied={n: names[id(p)] for n, p in model.named_parameters(remove_duplicate=False) if n not in named},
    )
    state.cursor.subnetwork = state.subnetwork
    if config.simulate:
        simulate(model, plan, family_of(model.config), state.cursor)
    elif config.masking == "backward":
        mask_weight_gradients(model, plan, state.cursor, [state.subnetwork])
    else:
        _keep_held_parts(model, state)
    for name, p in model.named_parameters():
        if name not in state.held:
            state.held[name] = _whole(plan, name, p)
    _remember_replaced(state, named)
    set_state(model, state)
    install(model)
    return model


def _agree(
    model: nn.Module, config: SDPConfig, rank: int | None, world_size: int | None, *, meta: bool
) -> tuple[int, int, Plan]:
    """Rank, world size and plan, after all checks. Collective when a process group is up: what is wrong on one
    worker is an error on all, and every worker must have made the same plan from the same config."""
    plan, error = None, None
    try:
        if not isinstance(config, SDPConfig):
            raise SDPConfigError(f"config must be an SDPConfig, got {type(config).__name__}.")
        rank, world_size = _resolve_world(config, rank, world_size)
        plan = make_plan(model, config, _check(model, config, world_size, meta))
    except SDPConfigError as raised:
        error = raised
    raise_together(error)
    if process_group_is_up():
        everyone: list = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (plan.hash, str(config)))
        for other, (plan_hash, other_config) in enumerate(everyone):
            if (plan_hash, other_config) != everyone[0]:
                raise SDPConfigError(
                    f"Workers disagree: rank 0 has plan {everyone[0][0][:12]} from {everyone[0][1]}, rank {other} has plan "
                    f"{plan_hash[:12]} from {other_config}. Give every worker the same model config and SDPConfig."
                )
    return rank, world_size, plan


def _resolve_world(config: SDPConfig, rank: int | None, world_size: int | None) -> tuple[int, int]:
    launched = int(os.environ.get("WORLD_SIZE", "1"))
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
                f"No process group is up (WORLD_SIZE={os.environ.get('WORLD_SIZE', 'not set')}). Create TrainingArguments "
                "or an Accelerator before patch_model, launch with one of configs/accelerate/*.yaml, or pass rank and "
                "world_size; for one process use SDPConfig(simulate=N)."
            )
        rank, world_size = 0, 1
    elif rank is None or world_size is None or not 0 <= rank < world_size:
        raise SDPConfigError(
            f"rank and world_size must be given together with 0 <= rank < world_size, got {rank}, {world_size}."
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
    if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
        raise SDPConfigError(
            f"patch_model needs a transformers model, got {type(model).__name__}. Patch before wrapping (DDP, "
            "torch.compile, PEFT)."
        )
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise SDPConfigError(
            "PEFT adapters are not supported: their slices would not follow the plan. Patch without them."
        )
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "hf_device_map", None):
        raise SDPConfigError(
            "Quantized models and device_map are not supported. Load the model in full, on one device."
        )
    for name, p in model.named_parameters():
        if p.is_meta and not meta:
            raise SDPConfigError(
                f"{name} is on the meta device: there are no values to keep. Use hf_sdp.from_pretrained or from_config, "
                "or load or initialize the model."
            )
        if type(p) is not nn.Parameter:
            raise SDPConfigError(f"{name} is a {type(p).__name__}: the model is already sharded. Patch it before.")
    refuse_reentrant_checkpointing(model)
    num_subnetworks = config.simulate or config.num_subnetworks or world_size
    if not config.simulate and world_size % num_subnetworks:
        divisors = [d for d in range(1, world_size + 1) if world_size % d == 0]
        raise SDPConfigError(
            f"num_subnetworks={num_subnetworks} does not divide the world of {world_size} workers. Use one of {divisors}."
        )
    return num_subnetworks


def _send_values_of_rank_0(model: nn.Module) -> None:
    backends = dist.get_backend_config() if hasattr(dist, "get_backend_config") else ""
    cpu_works = "cpu:" in str(backends) or dist.get_backend() in ("gloo", "fake", "mpi")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu" and not cpu_works:
                staged = tensor.to(torch.device("cuda", torch.cuda.current_device()))
                dist.broadcast(staged, src=0)
                tensor.copy_(staged)
            else:
                dist.broadcast(tensor.data, src=0)


def _keep_held_parts(model: nn.Module, state: SDPState) -> None:
    """Forward masking: replace every maskable module by what this worker holds of it."""
    family = family_of(model.config)
    norms = {block.kind: (block.module, block.norm) for block in family.blocks}
    held: dict[str, list] = {}
    for part in state.plan.held_parts(state.subnetwork):
        held.setdefault(part.module, []).append(part)
    for module_plan in state.plan.modules:
        name, parts = module_plan.name, held.get(module_plan.name, [])
        parent, _, child = name.rpartition(".")
        if state.plan.level == "neuron":
            biases = _shared_biases(state.plan, model.get_submodule(name), name)
            # Where others sum several parts and then add the biases, so does who has one part: the order is global.
            is_sum = len(parts) > 1 or bool(biases) and name in state.plan.split_modules
            modules = _narrow(model, name, parts, adds_bias=not is_sum)
            if is_sum:
                setattr(model.get_submodule(parent), child, PartSum(modules, biases))
            for index, (part, module) in enumerate(zip(parts, modules, strict=True)):
                local_name = f"{name}.parts.{index}" if is_sum else name
                for full, cut in part.ranges.items():
                    state.held[local_name + full.removeprefix(name)] = Held(full, *cut, part.holders)
                state.local_parts.append(LocalPart(part, [module]))
            continue
        norm = f"{parent}.{norms[module_plan.kind][1]}" if module_plan.kind in norms else None
        if parts:
            modules = [model.get_submodule(norm)] if norm else []
            state.local_parts.append(LocalPart(parts[0], [*modules, model.get_submodule(name)]))
            for full, cut in parts[0].ranges.items():
                state.held[full] = Held(full, *cut, parts[0].holders)
        else:
            setattr(model.get_submodule(parent), child, SKIPPED[module_plan.kind]())
            if norm:
                setattr(model.get_submodule(parent), norm.rpartition(".")[2], nn.Identity())


def _narrow(model: nn.Module, name: str, parts: list, *, adds_bias: bool) -> list[nn.Module]:
    module = model.get_submodule(name)
    narrowed = [narrow_module(module, part, adds_bias=adds_bias) for part in parts]
    if len(narrowed) == 1:  # keep the module object itself: hooks and references of the host stay valid
        module._modules = narrowed[0]._modules
        return [module]
    return narrowed


def _shared_biases(plan: Plan, module: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Child name -> bias, of the children whose weight is cut and whose bias is not (row-wise layers)."""
    return {
        child: linear.bias
        for child, linear in module.named_children()
        if getattr(linear, "bias", None) is not None and plan.slices[f"{name}.{child}.bias"][0].unit is None
    }


def _whole(plan: Plan, local_name: str, parameter: nn.Parameter) -> Held:
    """A local parameter that is a full parameter: shared, or (backward masking, simulation) not cut locally."""
    name = re.sub(r"\.shared_bias(es)?(?=\.)", "", local_name)
    if plan.shapes[name] != tuple(parameter.shape):
        raise AssertionError(f"{local_name}: {tuple(parameter.shape)} is not the full shape {plan.shapes[name]}")
    return Held(name, 0, 0, parameter.shape[0], plan.everyone)


def _remember_replaced(state: SDPState, named: dict[str, nn.Parameter]) -> None:
    """An optimizer made before patching refers to the full parameters."""
    local_names: dict[str, list[str]] = {name: [] for name in named}
    for local_name, held in state.held.items():
        local_names[held.name].append(local_name)
    for name, parameter in named.items():
        state.replaced[parameter] = local_names[name]
