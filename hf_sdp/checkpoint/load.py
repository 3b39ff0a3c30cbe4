"""Loading a checkpoint folder, whoever wrote it, into a model and optimizer, whatever their plan."""

import json
import logging
from pathlib import Path

import torch
from torch import nn

from ..compat import converts_checkpoints
from ..engine.fsdp import reshard
from ..engine.presence import come_to
from ..engine.sharded import control_group, find_sharded, stored_tensors
from ..errors import SDPConfigError, SDPStateError
from ..families.model_config import differences
from ..model.state import find_peft, find_state, get_state, unwrap
from ..plan.region import Region
from ..world.agreement import from_rank_0, together
from .adapters import saved_adapters
from .converted import ConvertedWeights
from .files import size_of
from .marker import OPTIMIZER, changes, check_together, phase_of_schedule, read_marker
from .optimizer_state import check_optimizer
from .saved_optimizer import SavedByTorch, SavedOptimizer
from .weights import RenamedWeights, Weights

logger = logging.getLogger(__name__)


def check_weights(model: nn.Module, folder: str | Path) -> Weights | RenamedWeights:
    """The folder's weights, or adapters of a model of PEFT, which fit the patched model; nothing is changed.

    Collective. Raises: as :func:`load_weights`, which alone looks into those that are converted while loading.
    """
    held, group = get_state(unwrap(model)).held, control_group(model)
    peft_model = find_peft(model)
    if peft_model is not None:
        check_together(folder, only="adapter", group=group)
        return saved_adapters(peft_model, folder)
    check_together(folder, only="model", group=group)
    file_names = from_rank_0(lambda: Weights(folder).file_names, group)
    with together(group):
        weights = Weights(folder, file_names)
        if not converts_checkpoints(unwrap(model)):
            weights.check(held.plan.shapes)
        check_config(model, folder)
    return weights


@torch.no_grad()
def load_weights(model: nn.Module, folder: str | Path) -> None:
    """Load the weights of a standard folder into a patched model: every worker reads only what it stores. Collective.

    Where the model's class converts its checkpoints (fused experts, ...) every worker loads all of it, and takes what
    it stores.

    Raises: on every worker, before anything is changed: SDPStateError when weights are missing or damaged,
        SDPConfigError when a parameter is missing or has another shape, or the folder's config.json makes another
        model.
    """
    group = control_group(model)
    come_to(model, "loading weights")
    weights: Weights | RenamedWeights | ConvertedWeights = check_weights(model, folder)
    if converts_checkpoints(unwrap(model)) and isinstance(weights, Weights):
        with together(group):
            weights = ConvertedWeights(folder, get_state(model).held.model_class)
    read_weights(model, weights)


@torch.no_grad()
def read_weights(model: nn.Module, weights: Weights | RenamedWeights | ConvertedWeights) -> None:
    """Read what this worker stores into a patched model, of all parameters and buffers that there are. Collective."""
    model = unwrap(model)
    sharded, group = find_sharded(model), control_group(model)
    if sharded is not None:
        reshard(model)
        sharded.weights_changed()  # first: if reading fails halfway, nothing that was kept is current
    with together(group):
        for region, tensor in stored_tensors(model):
            if region.numel and weights.shape(region.name) is not None:
                weights.read(region, tensor)
        for name, buffer in model.named_buffers():
            if weights.shape(name) == tuple(buffer.shape):
                weights.read(Region.whole(name, tuple(buffer.shape)), buffer)


def check_config(model: nn.Module, folder: str | Path) -> None:
    """Raises SDPConfigError when a patched model's config has a value that makes it another model than the folder's.

    Its weights would fit, and silently mean something else (``rope_theta``, ``rms_norm_eps``, ...).
    """
    file = Path(folder) / "config.json"
    if not file.is_file():
        return
    config = get_state(model).held.full_config
    try:
        found = differences(config, json.loads(file.read_text()))
    except Exception as error:  # the host's validators raise what they like
        raise SDPStateError(f"{file} cannot be read: {error!r}.") from error
    if found:
        raise SDPConfigError(
            f"{file} is of another model: "
            + "; ".join(f"{key}={saved!r} there, {now!r} here" for key, (saved, now) in found.items())
            + f". Make the model from AutoConfig.from_pretrained({str(folder)!r})."
        )


def find_optimizer_state(folder: str | Path, index: int = 0) -> Path:
    """The folder (of SDP) or file (of a plain Trainer or Accelerator) with the state of the ``index``-th optimizer.

    Raises: SDPStateError when there is none, SDPConfigError without permission.
    """
    suffix = f"_{index}" if index else ""
    names = (f"{OPTIMIZER}{suffix}", f"optimizer{suffix}.pt", f"optimizer{suffix}.bin")
    found = next((Path(folder) / name for name in names if size_of(Path(folder) / name) is not None), None)
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
    group = control_group(model)
    check_together(folder, only=OPTIMIZER, group=group)
    found = from_rank_0(lambda: find_optimizer_state(folder, index), group)
    with together(group):
        of_sdp = found.name.startswith(OPTIMIZER)
        saved: SavedOptimizer | SavedByTorch | None = SavedOptimizer(found, model) if of_sdp else None
    if saved is None:
        saved = SavedByTorch(found, optimizer, model)
    check_optimizer(optimizer, model, saved)
    return saved


def tell_changes(model: nn.Module, folder: str | Path, world_size: int, rank: int) -> None:
    """Warn, on rank 0, of what is different from the run that wrote the checkpoint. Whether its phase is, is known at
    the next step."""
    if rank != 0:
        return
    state, saved = find_state(model), read_marker(Path(folder))
    if state is not None and state.schedule is not None:
        state.schedule.resumed = phase_of_schedule(saved, state.config)
    differences = changes(saved, state, world_size)
    if differences:
        logger.warning("Continuing from %s. Different: %s.", folder, "; ".join(differences))
