"""Saving the full model as a standard Hugging Face folder, without ever holding all of it."""

import functools
import os
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING

import torch

from ..compat import converts_checkpoints
from ..engine.consolidate import consolidate, persistent_buffers
from ..engine.sharded import Sharded, control_group, get_sharded
from ..model.state import get_state, unwrap
from ..world.agreement import together
from .weights import WeightsWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def save_pretrained(model: "PreTrainedModel", folder: str | os.PathLike, max_shard_size: int | str = "50GB") -> None:
    """Save the full model as ``model.save_pretrained(folder)`` would without SDP. Collective, at any time.

    Rank 0 writes, tensor by tensor: no worker needs memory for more than one full parameter. What the folder has
    stays valid until everything is written. A model whose class converts its checkpoints (fused experts, ...) or that
    comes with code of its own is put together on rank 0 and saved by transformers.

    Raises: SDPStateError before the model is sharded; when another worker does something else; on every worker when
        rank 0 cannot write.
    """
    model = unwrap(model)
    if get_state(model).held.simulated or converts_checkpoints(model) or model.is_remote_code():
        weights = consolidate(model)
        with together(control_group(model)):
            if weights is not None:
                type(model).save_pretrained(model, folder, state_dict=weights)  # not the instance's: it comes here
        return
    sharded = get_sharded(model, "save_pretrained")
    if sharded.roll_call is not None:
        sharded.roll_call.wait("saving the model")
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


def install_save_pretrained(model: "PreTrainedModel") -> None:
    """Let ``model.save_pretrained`` save the full model."""
    model.save_pretrained = MethodType(_save_pretrained(model.save_pretrained), model)


_NOT_GIVEN = object()


def _save_pretrained(original):
    @functools.wraps(original.__func__)
    def _save(self, save_directory, *args, state_dict=_NOT_GIVEN, **kwargs):
        """Saves the full model. Collective when ``state_dict`` is not given: call it on every worker, rank 0 writes."""
        if state_dict is None and get_state(self).held.rank != 0:
            return  # state_dict=accelerator.get_state_dict(model), which only rank 0 has
        if state_dict is not None and state_dict is not _NOT_GIVEN:
            return original(save_directory, *args, state_dict=dict(state_dict), **kwargs)  # the host empties its dict
        if not args and kwargs.keys() <= {"max_shard_size", "is_main_process"}:
            kwargs.pop("is_main_process", None)
            return save_pretrained(self, save_directory, **kwargs)
        weights = consolidate(self)  # push_to_hub, variant, ...: the host's way
        with together(control_group(self)):
            if weights is not None:
                original(save_directory, *args, state_dict=weights, **kwargs)

    return _save
