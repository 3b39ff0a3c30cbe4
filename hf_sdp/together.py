"""What goes wrong on one worker is an error on all of them: nobody is left waiting in a collective."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from .errors import SDPConfigError, SDPStateError


def process_group_is_up() -> bool:
    return dist.is_available() and dist.is_initialized()


def raise_together(error: Exception | None, group: dist.ProcessGroup | None = None) -> None:
    """Raise ``error`` here if there is one, and on the workers without an error that of the lowest rank that has one.
    Collective when a process group is up (one small all-gather).

    Raises: on other workers SDPConfigError if the error is one, else SDPStateError.
    """
    if not process_group_is_up():
        if error is not None:
            raise error
        return
    everyone: list = [None] * dist.get_world_size()
    mine = None if error is None else (isinstance(error, SDPConfigError), f"{type(error).__name__}: {error}")
    dist.all_gather_object(everyone, mine, group=group)
    if error is not None:
        raise error
    for rank, theirs in enumerate(everyone):
        if theirs is not None:
            is_config, message = theirs
            message = message.removeprefix("SDPConfigError: ").removeprefix("SDPStateError: ")
            raise (SDPConfigError if is_config else SDPStateError)(f"rank {rank}: {message}")


@contextlib.contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Run the block on all workers; if it raises on any, all raise. Collective at its end; no collectives within."""
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    raise_together(error, group)
