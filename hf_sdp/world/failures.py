"""What fails on one worker is told to the others, who otherwise only see that a connection was closed."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from ..compat import default_store, is_connection_error
from ..errors import SDPStateError
from .agreement import is_raised_by_all, process_group_is_up, raised_by_all


@contextlib.contextmanager
def failures_are_told() -> Iterator[None]:
    """Within, an exception on this worker is posted on the process group's store, before it goes on.

    A worker whose connection breaks, or that finds nobody at a roll call, looks there.

    Raises: SDPStateError that says which other worker has failed with what, in place of such an error. All other
        exceptions as they are.
    """
    if not process_group_is_up() or dist.get_backend() == "fake":
        yield
        return
    store, rank = dist.PrefixStore("hf_sdp/failures", default_store()), str(dist.get_rank())
    if store.check([rank]):
        store.set(rank, "")  # it has been dealt with
    try:
        yield
    except BaseException as error:
        if is_raised_by_all(error):
            raise
        if not is_connection_error(error) and not isinstance(error, SDPStateError):
            _post(store, rank, error)
            raise
        told = _of_others(store, rank)
        if told:
            raise raised_by_all(SDPStateError(f"Rank {rank} cannot go on: {told}")) from error
        if isinstance(error, SDPStateError):
            _post(store, rank, error)
        raise


def _post(store: dist.Store, rank: str, error: BaseException) -> None:
    with contextlib.suppress(dist.DistError):  # the worker that has the store has ended
        store.set(rank, f"{type(error).__name__}: {error}".removeprefix("SDPStateError: "))


def _of_others(store: dist.Store, mine: str) -> str:
    """What others have posted, by rank."""
    try:
        ranks = [rank for rank in map(str, range(dist.get_world_size())) if rank != mine and store.check([rank])]
        told = {rank: store.get(rank).decode() for rank in ranks}
    except dist.DistError as error:
        return f"the worker that has the store has ended ({error})."
    return " ".join(f"rank {rank} has failed with {text}" for rank, text in told.items() if text)
