"""What goes wrong on one worker is an error on all of them: nobody is left waiting in a collective."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
import torch.distributed as dist

from ..errors import SDPConfigError, SDPStateError

_RAISED_BY_ALL = "_hf_sdp_raised_by_all"
T = TypeVar("T")


def process_group_is_up() -> bool:
    return dist.is_available() and dist.is_initialized()


def launched_workers() -> int:
    """How many a launcher has started, also before there is a process group; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def raised_by_all(error: Exception) -> Exception:
    """Mark an error that every worker raises at this point: an outer :func:`together` has nothing to agree on."""
    setattr(error, _RAISED_BY_ALL, True)
    return error


def is_raised_by_all(error: BaseException | None) -> bool:
    return getattr(error, _RAISED_BY_ALL, False)


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise ``error`` here if there is one, and on the workers without an error that of the lowest rank that has one.
    Collective when a process group is up (one small all-gather), unless the error has been raised together already.

    Raises: on other workers SDPConfigError if the error is one, else SDPStateError.
    """
    if not process_group_is_up() or is_raised_by_all(error):
        if error is not None:
            raise error
        return
    mine = None if error is None else (isinstance(error, SDPConfigError), f"{type(error).__name__}: {error}")
    everyone = of_everyone(mine, group)
    if error is not None:
        raise raised_by_all(error)
    for rank, theirs in enumerate(everyone):
        if theirs is not None:
            is_config, message = theirs
            message = message.removeprefix("SDPConfigError: ").removeprefix("SDPStateError: ")
            raise raised_by_all((SDPConfigError if is_config else SDPStateError)(f"rank {rank}: {message}"))


@contextlib.contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the block on all workers; if it raises on any, all raise. Collective at its end; no collectives within."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_together(error, group)


def is_rank_0() -> bool:
    """Also of a process that is alone."""
    return not process_group_is_up() or dist.get_rank() == 0


def of_everyone(mine: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """What every worker gives, by rank. Collective when a process group is up (one small all-gather)."""
    if not process_group_is_up():
        return [mine]
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def from_rank_0(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """What ``function`` returns on rank 0, on every worker; only rank 0 calls it. Collective.

    For all that may look different from worker to worker, and must not be decided differently (a folder's listing).
    Raises: on every worker what ``function`` raises.
    """
    result: list = [None]
    with together(group):
        if is_rank_0():
            result[0] = function()
    if process_group_is_up():
        dist.broadcast_object_list(result, src=0, group=group)
    return result[0]


def any_worker(mine: bool, group: dist.ProcessGroup | None) -> bool:
    """Whether it is so on any worker. Collective over a gloo ``group``: one all-reduce of four bytes."""
    vote = torch.tensor(int(mine), dtype=torch.int32)
    dist.all_reduce(vote, op=dist.ReduceOp.MAX, group=group)
    return bool(vote)


def agree(things: Mapping[str, Mapping[str, object]], remedy: str, group: dist.ProcessGroup | None = None) -> None:
    """Raise unless ``things`` are the same on all workers. Collective when a process group is up.

    One small all-gather of a digest; only when workers differ is it said of what.

    Args:
        things: what is compared -> key -> value; values are compared, and shown, by their ``str``.
        remedy: the end of the message.
    Raises: SDPConfigError, the same on every worker, with the first difference from rank 0: key, values, and rank.
    """
    if not process_group_is_up():
        return
    mine = {what: {key: str(value) for key, value in values.items()} for what, values in things.items()}
    digests = of_everyone(hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest(), group)
    if len(set(digests)) == 1:
        return
    of_rank_0 = [mine]
    dist.broadcast_object_list(of_rank_0, src=0, group=group)
    everyone = of_everyone(_first_difference(of_rank_0[0], mine), group)
    rank, said = next((rank, said) for rank, said in enumerate(everyone) if said)
    what, key, first, other = said
    raise raised_by_all(
        SDPConfigError(f"Workers disagree on {what}: {key}={first} on rank 0, {key}={other} on rank {rank}. {remedy}")
    )


def _first_difference(first: dict[str, dict[str, str]], other: dict[str, dict[str, str]]) -> tuple | None:
    for what in {**first, **other}:
        a, b = first.get(what, {}), other.get(what, {})
        for key in {**a, **b}:
            if a.get(key) != b.get(key):
                return what, key, a.get(key, "(none)"), b.get(key, "(none)")
    return None
