"""Loading a checkpoint folder, whoever wrote it, into a model and optimizer, whatever their plan."""

import logging
from pathlib import Path

import torch
from torch import nn

from ..engine.placement import full_box, local_box, numel
from ..errors import SDPStateError
from ..model.state import find_state, get_state, local_tensor, reshard, unwrap
from ..world.agreement import together
from . import folder as checkpoint
from .optimizer_state import SavedByTorch, SavedOptimizer, check_optimizer
from .weights import Weights

logger = logging.getLogger(__name__)


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights of a standard folder into a patched model: every worker reads only what it stores. Collective.

    Raises: on every worker, before anything is changed: SDPStateError when weights are missing or damaged,
        SDPConfigError when a parameter is missing or has another shape.
    """
    model = unwrap(model)
    state = get_state(model)
    with together(state.control_group):
        checkpoint.check(folder, only="model")
        weights = Weights(folder)
        weights.check(state.plan.shapes)
    if state.sharded:
        reshard(model)
    state.version += 1  # first: if reading fails halfway, nothing that was kept is current
    with together(state.control_group):
        for local_name, parameter in (state.parameters or dict(model.named_parameters())).items():
            held = state.held[local_name]
            box = local_box(state, held)
            if numel(box):
                local_tensor(parameter.detach()).copy_(weights.read(held.name, box))
        for name, buffer in model.named_buffers():
            if weights.shape(name) == tuple(buffer.shape):
                buffer.copy_(weights.read(name, full_box(tuple(buffer.shape))))


def find_optimizer_state(folder: str | Path, index: int = 0) -> Path:
    """The folder (of SDP) or file (of a plain Trainer or Accelerator) with the state of the ``index``-th optimizer.

    Raises: SDPStateError when there is none.
    """
    suffix = f"_{index}" if index else ""
    names = (f"{checkpoint.OPTIMIZER}{suffix}", f"optimizer{suffix}.pt", f"optimizer{suffix}.bin")
    found = next((Path(folder) / name for name in names if (Path(folder) / name).exists()), None)
    if found is None:
        raise SDPStateError(
            f"{folder} has no optimizer state (save_only_model=True?): training would go on with a fresh optimizer. To "
            "start anew from its weights, use hf_sdp.from_pretrained."
        )
    return found


def open_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, folder: str | Path, index: int = 0
) -> SavedOptimizer | SavedByTorch:
    """The state of the folder's ``index``-th optimizer, for ``load_optimizer``; nothing is changed. Collective.

    Raises: SDPStateError on every worker when there is none, it is damaged, or it does not fit ``optimizer``.
    """
    state = find_state(model)
    group = state.control_group if state is not None else None
    with together(group):
        checkpoint.check(folder)
        found = find_optimizer_state(folder, index)
        saved = SavedOptimizer(found, model) if found.is_dir() else None
    if saved is None:
        saved = SavedByTorch(found, optimizer, model)
    check_optimizer(optimizer, model, saved)
    return saved


def tell_changes(model: nn.Module, folder: str | Path, world_size: int, rank: int) -> None:
    """Warn, on rank 0, of what is different from the run that wrote the checkpoint."""
    differences = checkpoint.changes(checkpoint.check(folder), find_state(model), world_size)
    if differences and rank == 0:
        logger.warning("Continuing from %s. Different: %s.", folder, "; ".join(differences))
