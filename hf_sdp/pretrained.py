"""Models that never exist in full: made on the meta device, patched and sharded there, filled slice by slice."""

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from huggingface_hub import snapshot_download
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from .checkpoint.load import load_weights, read_weights
from .checkpoint.new_adapters import initialize_adapters, seed_of, weights_of_base, with_new_adapters
from .checkpoint.weights import Weights
from .compat import converts_checkpoints
from .config import SDPConfig
from .engine.shard import shard
from .engine.sharded import control_group, stored_tensors
from .errors import SDPConfigError
from .families.adapters import without_peft
from .families.meta_model import meta_model
from .model.state import get_state
from .model.statistics import batch_norms
from .patch import patch_meta_model, patch_model
from .plan.region import Region
from .world.agreement import agree, process_group_is_up, together

if TYPE_CHECKING:
    from peft import PeftConfig

_WEIGHTS_AND_CONFIGS = ["model*.safetensors", "*.json"]


def from_pretrained(
    name_or_path: str | os.PathLike,
    sdp_config: SDPConfig,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
    auto_class: type[Any] = AutoModelForCausalLM,
    peft_config: "PeftConfig | None" = None,
    seed: int = 0,
    **hub_options,
) -> nn.Module:
    """A pretrained model as a patched model, of which each worker reads only what it stores.

    With a process group the model comes sharded, on ``device``: the host's memory never has more than this worker's
    shards and the piece of one tensor that is being read. A checkpoint whose tensors are not the model's (converted
    while loading, or not safetensors) is loaded in full on every worker and cut; a warning says so.

    Args:
        name_or_path: a folder or a name on the Hub.
        dtype: of the parameters; default: the config's, else that of the weights.
        device: default: the one of Accelerate's ``PartialState``.
        rank, world_size: without a process group; the model then has this worker's slices, not sharded, on the CPU.
        auto_class: the transformers Auto class.
        peft_config: new LoRA adapters around it; what is returned is then a model of PEFT. They are the same whatever
            the world and the plan; ``seed`` decides their values.
        hub_options: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.
    Returns: the model in eval mode, as transformers does. Collective when a process group is up.
    Raises: SDPConfigError on every worker; the errors of transformers when there is no such model.
    """
    with together():
        model_config = AutoConfig.from_pretrained(name_or_path, **hub_options)
        folder = Path(name_or_path)
        if not folder.is_dir():
            folder = Path(snapshot_download(str(name_or_path), allow_patterns=_WEIGHTS_AND_CONFIGS, **hub_options))
        weights, problem = None, None
        with torch.device("meta"):
            model = auto_class.from_config(model_config)
        if sdp_config.simulate:
            problem = "simulation needs the full model"
        elif converts_checkpoints(model):
            problem = f"checkpoints of {type(model).__name__} are converted while loading"
        else:
            try:
                weights = Weights(folder)
                weights.check({name: tuple(p.shape) for name, p in model.named_parameters()})
            except SDPConfigError as error:
                problem = str(error)
    agree({"the checkpoint": {"loaded in full, since": problem}}, "Let every worker load the same checkpoint.")
    if problem:
        if not sdp_config.simulate:
            warnings.warn(f"Every worker loads {name_or_path} in full and cuts it: {problem}", stacklevel=2)
        of_dtype = {} if dtype is None else {"dtype": dtype}
        with together():
            full = auto_class.from_pretrained(name_or_path, **of_dtype, **hub_options)
            if peft_config is not None:
                from peft import get_peft_model

                full = get_peft_model(full, peft_config)
        patch_model(full, sdp_config, rank=rank, world_size=world_size)
        if process_group_is_up() and not sdp_config.simulate:
            shard(full, _device(device))
        return full.eval()
    assert weights is not None  # else there was a problem
    with together():
        if dtype in (None, "auto"):
            dtype = model_config.dtype or weights.dtype(next(iter(weights.files)))
        _cast(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        base = model
        if peft_config is not None:
            model = with_new_adapters(base, peft_config)
            renamed = weights_of_base(model, weights)
    _materialize(model, sdp_config, rank, world_size, device)
    with together():
        _fill_buffers(base)
    if peft_config is None:
        load_weights(model, folder)
    else:
        read_weights(model, renamed)
        initialize_adapters(model, renamed, seed)
    with together():
        if base.can_generate() and (folder / "generation_config.json").is_file():
            base.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


@torch.no_grad()
def from_config(
    model_config: PreTrainedConfig,
    sdp_config: SDPConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    rank: int | None = None,
    world_size: int | None = None,
) -> nn.Module:
    """A randomly initialized patched model, of which each worker makes only what it stores.

    Values come from the family's own initialization, run for one module of the full model at a time with a random state
    that depends on ``seed`` and the module's name: they are the same whatever the world, the plan and the device. Needs
    memory for the shards and the largest full parameter. Other arguments and what is returned (in train mode): as
    :func:`from_pretrained`. Collective when a process group is up.

    Raises: SDPConfigError, also for a parameter that its own module does not initialize.
    """
    with together():
        model = meta_model(model_config)
        if dtype is not None:
            _cast(model, dtype)
    agree({"from_config": {"seed": seed}}, "Give every worker the same seed.")
    if sdp_config.simulate:
        model.to_empty(device="cpu")
        model.tie_weights()
        patch_meta_model(model, sdp_config, rank=rank, world_size=world_size)
    else:
        _materialize(model, sdp_config, rank, world_size, device)
    with together(control_group(model)):
        _fill_buffers(model)
        _initialize(model, seed, next(model.parameters()).dtype)
    return model


def _materialize(model: nn.Module, sdp_config: SDPConfig, rank, world_size, device) -> None:
    """Patch a model on the meta device and give it memory, with no values in it yet."""
    patch_meta_model(model, sdp_config, rank=rank, world_size=world_size)
    if process_group_is_up():
        shard(model, _device(device))
    else:
        model.to_empty(device="cpu")
        without_peft(model).tie_weights()


def _device(device: torch.device | str | None) -> torch.device:
    return torch.device(device) if device is not None else PartialState().device


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters only: rotary frequencies stay in float32, as in transformers."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def _fill_buffers(model: PreTrainedModel) -> None:
    """Buffers that no checkpoint has (rotary frequencies), as transformers fills them after loading, and statistics of
    batch norms as those of new ones. In place."""
    for norm in batch_norms(model).values():
        norm.reset_running_stats()
    for module in model.modules():
        if module._non_persistent_buffers_set:
            model._init_weights(module)


def _initialize(model: nn.Module, seed: int, dtype: torch.dtype) -> None:
    wanted: dict[str, list[tuple[Region, torch.Tensor]]] = {}
    for region, tensor in stored_tensors(model):
        wanted.setdefault(region.name, []).append((region, tensor))
    full = meta_model(get_state(model).held.full_config, get_state(model).held.model_class).to(dtype)
    for prefix, module in full.named_modules():
        names = {n: f"{prefix}.{n}" if prefix else n for n, p in module._parameters.items() if p is not None}
        if not wanted.keys() & names.values():
            continue
        _initialize_module(full, module, f"{seed}/{prefix}")
        for n, name in names.items():
            values = module._parameters[n].detach()
            if values.isnan().any():
                raise SDPConfigError(
                    f"{type(full).__name__} does not initialize {name} by its own module ({type(module).__name__}). "
                    "Make the model in full and call patch_model."
                )
            for region, tensor in wanted.get(name, ()):
                tensor.copy_(region.of(values))
            module._parameters[n] = nn.Parameter(values.to("meta"))


def _initialize_module(full: PreTrainedModel, module: nn.Module, seed: str) -> None:
    """Give the parameters of one module of a meta model memory and values; those that are not initialized are NaN."""
    for n, p in list(module._parameters.items()):
        if p is not None:
            module._parameters[n] = nn.Parameter(torch.full(p.shape, torch.nan, dtype=p.dtype, device="cpu"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed))
        full._init_weights(module)
