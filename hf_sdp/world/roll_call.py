"""The roll call: every worker announces each thing that it does together with the others.

A collective that only some workers enter hangs, or pairs with another one and is silently wrong. Workers therefore
post what they are about to do, and how many things they have done before, on the process group's store. Where a
mistake is likely (evaluation, saving), a worker then waits for the others: once all have come to the same thing it
goes on; if one has come to another thing, or has gone past, there is an error within milliseconds on those that wait.
"""

import atexit
import contextlib
import itertools
import json
import time
import weakref

import torch.distributed as dist

from ..compat import default_store
from ..errors import SDPStateError

_numbers = itertools.count()


class RollCall:
    """Made by all workers in the same order.

    ``timeout_s``: how long :meth:`wait` waits for a worker that does nothing.
    """

    def __init__(self, rank: int, world_size: int, timeout_s: float):
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.count, self.what, self.waited = 0, "", (0, "")
        self.store = dist.PrefixStore(f"hf_sdp/{next(_numbers)}", default_store())
        atexit.register(_say_goodbye, weakref.ref(self))

    def announce(self, what: str) -> None:
        """Post what this worker is about to do, without waiting (one message to the store)."""
        self.count, self.what = self.count + 1, what
        self._post()

    def _post(self) -> None:
        # What was waited for last stays posted: a worker that goes on before others have looked has been there.
        self.store.set(str(self.rank), json.dumps([self.count, self.what, *self.waited]))

    def wait(self, what: str, how: str = "") -> None:
        """Announce ``what`` and wait until all workers have come to it.

        Args:
            how: what they must agree on beside it.
        Raises: SDPStateError when a worker is elsewhere, or has done nothing for ``timeout_s``.
        """
        before = self.count, self.what, self.waited
        try:
            self.waited = (self.count + 1, what + how)
            self.announce(what + how)
            self._wait(what, what + how)
        except BaseException:
            # It has not been done: what comes next has this number on all workers again.
            self.count, self.what, self.waited = before
            self._post()
            raise

    def _wait(self, what: str, awaited: str) -> None:
        missing = [rank for rank in range(self.world_size) if rank != self.rank]
        deadline, pause_s = time.monotonic() + self.timeout_s, 0.0
        while True:
            missing = [rank for rank in missing if not self._has_come(rank, what, awaited)]
            if not missing:
                return
            if time.monotonic() > deadline:
                raise SDPStateError(
                    f"Rank {self.rank}: {what} is a collective, but ranks {missing} have not come to it within "
                    f"{self.timeout_s:g} s. {_REMEDY}"
                )
            time.sleep(pause_s)
            pause_s = min(pause_s + 1e-4, 0.01)

    def _has_come(self, rank: int, what: str, awaited: str) -> bool:
        try:
            if not self.store.check([str(rank)]):
                return False
            count, theirs, *waited = json.loads(self.store.get(str(rank)))
        except dist.DistError as error:
            raise SDPStateError(
                f"Rank {self.rank}: {what}: the worker that has the store has ended ({error})."
            ) from error
        if waited == [self.count, awaited]:
            return True
        if count < self.count:
            return False
        raise SDPStateError(
            f"Rank {self.rank}: {what} is a collective, but rank {rank} has gone on to {theirs}. {_REMEDY}"
        )


_REMEDY = (
    "Call evaluate, predict, save_model and generate(synced_gpus=True) on all workers, with the same number of "
    "batches; or train with SDPConfig(evaluate='subnetwork', sharding='none'), whose forward is local."
)


def _say_goodbye(reference: weakref.ref) -> None:
    roll_call = reference()
    if roll_call is not None:
        with contextlib.suppress(Exception):  # the store may have ended before
            roll_call.announce("the end of its process")
