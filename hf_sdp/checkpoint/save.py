"""Saving the full model as a standard Hugging Face folder, without ever holding all of it."""

import os
from pathlib import Path

import torch
from torch import nn

from ..compat import converts_checkpoints
from ..engine.exchange import consolidate, persistent_buffers
from ..model.state import get_state, unwrap
from ..world.agreement import together
from .weights import WeightsWriter


@torch.no_grad()
def save_pretrained(model: nn.Module, folder: str | os.PathLike, max_shard_size: int | str = "50GB") -> None:
    """Save the full model as ``model.save_pretrained(folder)`` would without SDP. Collective, at any time.

    Rank 0 writes, tensor by tensor: no worker needs memory for more than one full parameter. What the folder has
    stays valid until everything is written. A model whose class converts its checkpoints (fused experts, ...) or that
    comes with code of its own is put together on rank 0 and saved by transformers.

    Raises: SDPStateError before the model is sharded; on every worker when rank 0 cannot write.
    """
    model = unwrap(model)
    state = get_state(model)
    if state.simulated or converts_checkpoints(model) or model.is_remote_code():
        weights = consolidate(model)
        with together(state.control_group):
            if state.rank == 0:
                type(model).save_pretrained(model, folder, state_dict=weights)  # not the instance's: it comes here
        return
    ignored = set(model._keys_to_ignore_on_save or ())
    writer = None
    with together(state.control_group):
        if state.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            specs = {name: (shape, state.dtypes[name]) for name, shape in state.plan.shapes.items()}
            specs.update({name: (tuple(b.shape), b.dtype) for name, b in persistent_buffers(model).items()})
            writer = WeightsWriter(folder, {n: s for n, s in specs.items() if n not in ignored}, max_shard_size)
    consolidate(model, lambda name, tensor: None if name in ignored else writer.write(name, tensor))
    with together(state.control_group):
        if writer is not None:
            writer.finish()
            save_configs(model, folder)


def save_configs(model: nn.Module, folder: str | os.PathLike) -> None:
    """config.json and generation_config.json of the full model, as ``PreTrainedModel.save_pretrained`` writes them."""
    state = get_state(model)
    config = state.full_config
    config.architectures = [state.model_name]
    dtype = next((d for d in state.dtypes.values() if d.is_floating_point), None)
    if dtype is not None:
        config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
