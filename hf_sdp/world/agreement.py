"""What goes wrong on one worker is an error on all of them: nobody is left waiting in a collective."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from ..errors import SDPConfigError, SDPStateError

_RAISED_BY_ALL = "_hf_sdp_raised_by_all"


def process_group_is_up() -> bool:
    return dist.is_available() and dist.is_initialized()


def raised_by_all(error: Exception) -> Exception:
    """Mark an error that every worker raises at this point: an outer :func:`together` has nothing to agree on."""
    setattr(error, _RAISED_BY_ALL, True)
    return error


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise ``error`` here if there is one, and on the workers without an error that of the lowest rank that has one.
    Collective when a process group is up (one small all-gather), unless the error has been raised together already.

    Raises: on other workers SDPConfigError if the error is one, else SDPStateError.
    """
    if not process_group_is_up() or getattr(error, _RAISED_BY_ALL, False):
        if error is not None:
            raise error
        return
    everyone: list = [None] * dist.get_world_size()
    mine = None if error is None else (isinstance(error, SDPConfigError), f"{type(error).__name__}: {error}")
    dist.all_gather_object(everyone, mine, group=group)
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
