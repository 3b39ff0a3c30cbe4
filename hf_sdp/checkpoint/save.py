"""Saving the full model as a standard Hugging Face folder, without ever holding all of it."""

import functools
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..compat import converts_checkpoints
from ..engine.consolidate import consolidate, persistent_buffers
from ..engine.presence import come_to
from ..engine.sharded import Sharded, control_group, get_sharded
from ..model.state import find_peft, get_state, unwrap
from ..world.agreement import together
from .adapters import NOT_GIVEN, adapter_tensors, adapter_weights
from .weights import WeightsWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def save_pretrained(model: "PreTrainedModel", folder: str | os.PathLike, max_shard_size: int | str = "50GB") -> None:
    """Save the full model as ``model.save_pretrained(folder)`` would without SDP. Collective, at any time.

    Rank 0 writes, tensor by tensor: no worker needs memory for more than one full parameter. What the folder has
    stays valid until everything is written. A model whose class converts its checkpoints (fused experts, ...) or that
    comes with code of its own is put together on rank 0 and saved by transformers.

    Of a model of PEFT its adapters are saved, as PEFT does.

    Raises: SDPStateError before the model is sharded; when another worker does something else; on every worker when
        rank 0 cannot write.
    """
    peft_model = find_peft(model)
    if peft_model is not None:
        return peft_model.save_pretrained(folder)  # SavesAdapters
    model = unwrap(model)
    if get_state(model).held.simulated or converts_checkpoints(model) or model.is_remote_code():
        weights = consolidate(model)
        with together(control_group(model)):
            if weights is not None:
                model.save_pretrained(folder, state_dict=weights)
        return
    sharded = get_sharded(model, "save_pretrained")
    come_to(model, "save_pretrained")
    ignored = set(model._keys_to_ignore_on_save or ())
    writer = None
    with together(sharded.control_group):
        if sharded.held.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            specs = {name: (shape, sharded.dtypes[name]) for name, shape in sharded.held.plan.shapes.items()}
            specs.update({name: (tuple(b.shape), b.dtype) for name, b in persistent_buffers(model).items()})
            writer = WeightsWriter(folder, {n: s for n, s in specs.items() if n not in ignored}, max_shard_size)

    def write(name: str, tensor: torch.Tensor) -> None:
        assert writer is not None  # only rank 0, which has made it, writes
        if name not in ignored:
            writer.write(name, tensor)

    consolidate(model, write)
    with together(sharded.control_group):
        if writer is not None:
            writer.finish()
            _save_configs(model, sharded, folder)


def _save_configs(model: "PreTrainedModel", sharded: Sharded, folder: str | os.PathLike) -> None:
    """config.json and generation_config.json of the full model, as ``PreTrainedModel.save_pretrained`` writes them."""
    config = sharded.held.full_config
    config.architectures = [sharded.held.model_name]
    dtype = next((d for d in sharded.dtypes.values() if d.is_floating_point), None)
    if dtype is not None:
        config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)


def weights_to_save(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """On the CPU of rank 0, None on the other workers: the full model, of a model of PEFT its adapters. Collective."""
    peft_model = find_peft(model)
    return consolidate(model) if peft_model is None else adapter_weights(peft_model)


def bytes_to_save(model: nn.Module) -> int:
    """Of the parameters in :func:`weights_to_save`; the same on all workers. Collective."""
    sharded, peft_model = get_sharded(model, "Saving"), find_peft(model)
    if peft_model is None:
        return sharded.full_bytes
    shapes = sharded.held.plan.shapes
    names = shapes.keys() & adapter_tensors(peft_model).values()
    return sum(math.prod(shapes[name]) * sharded.dtypes[name].itemsize for name in names)


class SavesFullModel:
    """Mixed into the class of a patched model: ``model.save_pretrained`` saves the full model."""

    def save_pretrained(self, save_directory, *args, state_dict=NOT_GIVEN, **kwargs):
        """Saves the full model. Collective when ``state_dict`` is not given: call it on every worker, rank 0 writes."""
        original = functools.partial(super().save_pretrained, save_directory, *args)  # type: ignore[misc]
        if state_dict is None and get_state(self).held.rank != 0:
            return  # state_dict=accelerator.get_state_dict(model), which only rank 0 has
        if state_dict is not None and state_dict is not NOT_GIVEN:
            return original(state_dict=dict(state_dict), **kwargs)  # the host empties its dict
        if not args and kwargs.keys() <= {"max_shard_size", "is_main_process"}:
            kwargs.pop("is_main_process", None)
            return save_pretrained(self, save_directory, **kwargs)
        weights = consolidate(self)  # type: ignore[arg-type]  # push_to_hub, variant, ...: the host's way
        with together(control_group(self)):
            if weights is not None:
                original(state_dict=weights, **kwargs)
