"""The roll call of a model: from patching on, all workers come to what they do together with it."""

from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import nn

from ..compat import default_store
from ..model.state import find_state, get_state, unwrap
from ..world.agreement import process_group_is_up
from ..world.roll_call import RollCall
from .sharded import control_group

_roll_calls: WeakKeyDictionary[nn.Module, RollCall] = WeakKeyDictionary()


def open_roll_call(model: nn.Module) -> None:
    """To be called on all workers in the same order, once the model is patched; a second call does nothing.

    Without effect in one process.
    """
    held = get_state(model).held
    roll_call = None if held.simulated or find_roll_call(model) else make_roll_call(held.config.evaluation_timeout_s)
    if roll_call is not None:
        _roll_calls[unwrap(model)] = roll_call


def make_roll_call(timeout_s: float) -> RollCall | None:
    """Of all workers, which make theirs in the same order; None without real communication."""
    if not process_group_is_up() or dist.get_backend() == "fake":
        return None
    return RollCall(default_store(), dist.get_rank(), dist.get_world_size(), timeout_s)


def find_roll_call(model: object) -> RollCall | None:
    """None for a model that is not patched, and without real communication."""
    return _roll_calls.get(unwrap(model)) if isinstance(model, nn.Module) and find_state(model) is not None else None


def come_to(model: object, what: str) -> None:
    """Wait until all workers have come to ``what``, before its first collective. Collective itself.

    Raises: SDPStateError when a worker is elsewhere, or has done nothing for ``SDPConfig.evaluation_timeout_s``.
    """
    roll_call = find_roll_call(model)
    if roll_call is not None:
        roll_call.wait(what)
        # A worker that went straight on to another roll call would be missed by those that have not looked yet.
        dist.barrier(group=control_group(model))


def announce(model: object, what: str) -> None:
    """Say, without waiting, that this worker goes on to ``what``, in which it may wait for the others."""
    roll_call = find_roll_call(model)
    if roll_call is not None:
        roll_call.announce(what)
