"""Loading a checkpoint folder, whoever wrote it, into a model and optimizer, whatever their plan."""

import logging
from pathlib import Path

import torch
from torch import nn

from . import checkpoint
from .errors import SDPStateError
from .layout import full_box, local_box, numel
from .optimizer_state import SavedByTorch, SavedOptimizer, load_optimizer
from .state import find_state, get_state, local_tensor, reshard, unwrap
from .together import together
from .weights import Weights

_BY_TORCH = ("optimizer.pt", "optimizer.bin")  # of a plain Trainer, of a plain Accelerator.save_state
logger = logging.getLogger(__name__)


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights of a standard folder into a patched model: every worker reads only what it stores. Collective.

    Raises: on every worker, before anything is changed: SDPStateError when the folder is incomplete or damaged,
        SDPConfigError when a parameter is missing or has another shape.
    """
    model = unwrap(model)
    state = get_state(model)
    with together(state.control_group):
        checkpoint.check(folder)
        weights = Weights(folder)
        weights.check(state.plan.shapes)
    if state.sharded:
        reshard(model)
    with together(state.control_group):
        for local_name, parameter in (state.parameters or dict(model.named_parameters())).items():
            held = state.held[local_name]
            box = local_box(state, held)
            if numel(box):
                local_tensor(parameter.detach()).copy_(weights.read(held.name, box))
        for name, buffer in model.named_buffers():
            if weights.shape(name) == tuple(buffer.shape):
                buffer.copy_(weights.read(name, full_box(tuple(buffer.shape))))
    state.version += 1


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, folder: str | Path, index: int = 0
) -> None:
    """Load the state of the folder's ``index``-th optimizer, written with or without SDP. Collective.

    Raises: SDPStateError on every worker when there is none, or it does not fit; see :func:`load_optimizer`.
    """
    folder = Path(folder)
    state = find_state(model)
    suffix = f"_{index}" if index else ""
    if (folder / (checkpoint.OPTIMIZER + suffix)).is_dir():
        with together(state.control_group if state else None):
            checkpoint.check(folder)
            saved = SavedOptimizer(folder / (checkpoint.OPTIMIZER + suffix), model)
    else:
        files = [folder / f"{n.partition('.')[0]}{suffix}.{n.partition('.')[2]}" for n in _BY_TORCH]
        file = next((f for f in files if f.is_file()), None)
        if file is None:
            raise SDPStateError(
                f"{folder} has no optimizer state (save_only_model=True?): training would go on with a fresh optimizer. To "
                "start anew from its weights, load them with from_pretrained before patch_model."
            )
        saved = SavedByTorch(file, optimizer, model)
    load_optimizer(optimizer, model, saved)


def tell_changes(model: nn.Module, folder: str | Path, world_size: int, rank: int) -> None:
    """Warn, on rank 0, of what is different from the run that wrote the checkpoint."""
    differences = checkpoint.changes(checkpoint.check(folder), find_state(model), world_size)
    if differences and rank == 0:
        logger.warning("Continuing from %s. Different: %s.", folder, "; ".join(differences))
