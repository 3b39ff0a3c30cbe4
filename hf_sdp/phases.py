"""The phases of a coverage schedule: at a boundary a model becomes the subnetwork of the next plan, in place.

What patching and sharding have done to its modules is taken back, and done again by the next plan. Weights and
optimizer state go from worker to worker in memory. The model stays the object that it is, with all that others have
put on it.
"""

import functools
import logging
import time
from collections.abc import Sequence

import torch
from torch import nn

from .compat import forget_fsdp
from .engine.fsdp import reshard
from .engine.handover import Handover, refuse_gradients, refuse_lost_state, said_of_hook
from .engine.optimizer import inner_optimizer
from .engine.presence import come_to
from .engine.shard import shard
from .engine.sharded import Sharded, control_group, find_sharded, get_sharded
from .engine.statistics import average_statistics
from .errors import SDPConfigError, SDPStateError
from .model.phases import Schedule
from .model.state import find_state, get_state, local_tensor, unwrap
from .patch import become_subnetwork
from .world.agreement import is_raised_by_all, raised_by_all, together

logger = logging.getLogger(__name__)


def follow_schedule(
    model: nn.Module, step: int, num_steps: int, optimizers: Sequence[torch.optim.Optimizer] = ()
) -> bool:
    """Rebuild a model if its ``coverage_schedule`` has another phase for the step that comes next.

    To be called before each step, on all workers, with no gradients left. The Trainer does it by itself
    (``SDPCallback``). Parameters are new ones after it: take ``model.parameters()`` again.

    Args:
        step: number of the step, counted from 0, of ``num_steps`` in all.
        optimizers: all that train the model. They keep their groups, state and schedulers.
    Returns: whether the model was rebuilt; then it was a collective, as at the second step. Without a schedule it is
        False.
    Raises: SDPStateError on every worker before the model is prepared, while it has gradients or its parameters have
        hooks, or when an optimizer that trains it is not given; SDPConfigError when a phase has no step, or splits that
        the host knows nothing of. Nothing is changed then. SDPStateError, too, when something fails on the way
        (memory): then the model is lost.
    """
    model = unwrap(model)
    state = find_state(model)
    schedule = None if state is None else state.schedule
    if schedule is None:
        return False
    if not schedule.host_splits and any(planned.phase.splits > 1 for planned in schedule.phases):
        raise SDPConfigError("splits of a phase is for the Trainer: split the batches of your own loop yourself.")
    sharded = find_sharded(model)
    optimizers = [inner_optimizer(optimizer) for optimizer in optimizers]
    number = schedule.phase_at(step, num_steps)
    if number == schedule.number and schedule.asked not in (None, step) and not schedule.is_between_steps:
        _refuse_in_time(model, schedule, sharded, optimizers)
    if number == schedule.number and sharded is not None:
        sharded.stepped.clear()
    schedule.asked = step
    if schedule.resumed is not None and number < schedule.resumed:
        logger.warning(
            "The checkpoint is of phase %d of the coverage schedule. Step %d of %d is of phase %d, to which the "
            "training goes back: it has more steps than it had.", schedule.resumed, step, num_steps, number,
        )  # fmt: skip
    schedule.resumed = None
    if number == schedule.number:
        return False
    assert state is not None
    if state.held.simulated:
        refuse_gradients(model, dict(model.named_parameters()))
        _patch_again(model, schedule, number)
    else:
        sharded = get_sharded(model, "The next phase of coverage_schedule")  # or an error
        come_to(model, f"phase {number} of the coverage schedule")
        began = time.perf_counter()
        average_statistics(model, sharded)
        reshard(model)
        handover = Handover(model, sharded, optimizers)
        _hand_over(model, schedule, number, sharded, handover)
        if state.held.rank == 0:
            logger.info(
                "Step %d of %d: phase %d of the coverage schedule, %s. %.1f s, rank 0 has sent %.1f MiB.",
                step, num_steps, number, schedule.current.phase.changes, time.perf_counter() - began,
                handover.bytes_sent / 2**20,
            )  # fmt: skip
    return True


def _refuse_in_time(
    model: nn.Module, schedule: Schedule, sharded: Sharded | None, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """What would be an error when the next phase begins is one at the second step, hours before. Collective."""
    come_to(model, "the second step of the coverage schedule")
    with together(control_group(model)):
        refuse_gradients(model, dict(model.named_parameters()) if sharded is None else sharded.parameters)
        if sharded is not None:
            refuse_lost_state(sharded, optimizers)
    schedule.is_between_steps = True
    if sharded is not None and sharded.held.rank == 0 and schedule.current is not schedule.phases[-1]:
        if (hook := said_of_hook(sharded)) is not None:
            logger.warning("%s", hook)


def _hand_over(model: nn.Module, schedule: Schedule, number: int, sharded: Sharded, handover: Handover) -> None:
    device = local_tensor(next(iter(sharded.parameters.values())).detach()).device
    sharded.parameters.clear()
    try:
        _patch_again(model, schedule, number, handover)
        held = get_state(model).held
        shard(model, device, functools.partial(handover.give, held=held, device=device))
    except Exception as cause:
        # Without its words: hosts begin anew, with this model, when they read that memory was short.
        error = SDPStateError(
            f"Phase {number} of the coverage schedule could not begin ({type(cause).__name__}). Weights were on their "
            "way, and this model cannot be used any more: make it anew, and continue from the newest checkpoint."
        )
        if is_raised_by_all(cause):
            raised_by_all(error)
        raise error from cause


def _patch_again(model: nn.Module, schedule: Schedule, number: int, handover: Handover | None = None) -> None:
    before = get_state(model)
    replaced = {m: vars(m)["sdp_replaced"] for m in model.modules() if vars(m).get("sdp_replaced") is not None}
    for hook in before.run.hooks:
        hook.remove()
    forget_fsdp(model)
    while schedule.changes:
        schedule.changes.pop().take_back()
    for module, forward in replaced.items():
        vars(module)["forward"] = forward
    if handover is not None:
        _as_trained(model, handover)
    schedule.number = number
    become_subnetwork(model, before.held, schedule)
    get_state(model).run.version = before.run.version


def _as_trained(model: nn.Module, handover: Handover) -> None:
    """Full parameters on the meta device: who trains may have changed dtypes, and frozen some, since patching."""
    for name, parameter in model.named_parameters():
        dtype = handover.dtypes[name, None]
        parameter.requires_grad_(handover.learns[name])
        parameter.data = parameter.data.to(dtype)
