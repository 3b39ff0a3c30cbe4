"""The roll call: every worker announces each thing that it does together with the others.

A collective that only some workers enter hangs, or pairs with another one and is silently wrong. Workers therefore
post what they are about to do, and how many things they have done before, on the process group's store. Where a
mistake is likely (evaluation, saving), a worker then waits for the others: once all have come to the same thing it
goes on; if one has come to another thing, or has gone past, there is an error within milliseconds on those that wait
(seconds in a world of a thousand).

Who comes is counted, so that a worker sends a few messages however many others there are. It reads what the others
have posted, all with one message, only when it has waited for a while.
"""

import atexit
import contextlib
import itertools
import json
import time
import weakref

import torch.distributed as dist

from ..errors import SDPStateError

_numbers = itertools.count()


class RollCall:
    """Made by all workers in the same order. What it sends is a few messages for each call, whatever the world.

    ``store``: that of the process group. ``timeout_s``: how long :meth:`wait` waits for a worker that does nothing.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float):
        self.rank, self.world_size, self.timeout_s = rank, world_size, timeout_s
        self.count, self.what = 0, "its preparation"
        self.last = ""  # key of the last wait to which all have come
        self.store = dist.PrefixStore(f"hf_sdp/{next(_numbers)}", store)
        self._post()
        atexit.register(_say_goodbye, weakref.ref(self))

    def announce(self, what: str) -> None:
        """Post what this worker is about to do, without waiting (one message to the store)."""
        self.count, self.what = self.count + 1, what
        self._post()

    def _post(self) -> None:
        self.store.set(str(self.rank), json.dumps([self.count, self.what]))

    def wait(self, what: str, how: str = "") -> None:
        """Announce ``what`` and wait until all workers have come to it.

        Args:
            how: what they must agree on beside it.
        Raises: SDPStateError when a worker is elsewhere, or has done nothing for ``timeout_s``.
        """
        before = self.count, self.what
        key = f"{self.count + 1}/{what}{how}"
        try:
            self.announce(what + how)
            if self.store.add(key, 1) == self.world_size:
                self._tell_that_all_have_come(key)
            else:
                self._wait(what, key)
        except dist.DistError as error:
            self._take_back(key, *before)
            raise SDPStateError(
                f"Rank {self.rank}: {what}: the worker that has the store has ended ({error})."
            ) from error
        except BaseException:
            self._take_back(key, *before)
            raise
        self.last = key

    def _tell_that_all_have_come(self, key: str) -> None:
        self.store.set(key + _ALL, "")
        for old in (self.last, self.last + _ALL):  # for which nobody waits any more
            self.store.delete_key(old)

    def _take_back(self, key: str, count: int, what: str) -> None:
        """It has not been done: what comes next has this number on all workers again."""
        self.count, self.what = count, what
        with contextlib.suppress(dist.DistError):  # the store may have ended
            self.store.add(key, -1)
            self._post()

    def _wait(self, what: str, key: str) -> None:
        began = time.monotonic()
        # Most wait for less and never look: if all do, the store sends what all have posted to all.
        first_look_s = next_look_s = max(0.005, 5e-6 * self.world_size**2)
        while not self.store.check([key + _ALL]):
            waited_s = time.monotonic() - began
            if waited_s > next_look_s:
                missing = self._missing(what, key)
                if not missing:
                    return self._tell_that_all_have_come(key)
                if waited_s > self.timeout_s:
                    raise SDPStateError(
                        f"Rank {self.rank}: {what} is a collective, but ranks {_first(list(missing))} have not come to "
                        f"it within {self.timeout_s:g} s. They were last at: {_first(sorted(set(missing.values())))}. "
                        f"{_REMEDY}"
                    )
                next_look_s = min(2 * next_look_s, waited_s + max(1, first_look_s), self.timeout_s)
            # All ask one store, and a file is locked for who writes: whoever has waited for long asks less often.
            time.sleep(min(waited_s / 10, max(0.01, 1e-3 * self.world_size)))

    def _missing(self, what: str, key: str) -> dict[int, str]:
        """Who has not come yet -> where it was last.

        Raises: SDPStateError when a worker is elsewhere.
        """
        posted = self.store.multi_get([str(rank) for rank in range(self.world_size)])
        missing = {}
        for rank, (count, theirs) in enumerate(map(json.loads, posted)):
            if (count, theirs) == (self.count, self.what):
                continue
            if count < self.count and theirs != _END:
                missing[rank] = theirs
            elif self.store.check([key + _ALL]):  # it has been here, and all the others, too
                return {}
            elif theirs == self.what:
                raise SDPStateError(
                    f"Rank {self.rank}: {what} is a collective, but rank {rank} has come to it after "
                    f"{count - self.count} more forwards or collectives: it has more batches. Give every worker as "
                    "many (leave even_batches=True; an IterableDataset must be the same on all workers)."
                )
            else:
                raise SDPStateError(
                    f"Rank {self.rank}: {what} is a collective, but rank {rank} has gone on to {theirs}. {_REMEDY}"
                )
        return missing


_ALL = "/all"
_END = "the end of its process"


def _first(found: list) -> str:
    return f"{found[:8]}" + (f" and {len(found) - 8} more" if len(found) > 8 else "")


_REMEDY = (
    "Call evaluate, predict, save_model and generate(synced_gpus=True) on all workers, with the same number of "
    "batches; or train with SDPConfig(evaluate='subnetwork', sharding='none'), whose forward is local."
)


def _say_goodbye(reference: weakref.ref) -> None:
    roll_call = reference()
    if roll_call is not None:
        with contextlib.suppress(Exception):  # the store may have ended before
            roll_call.announce(_END)
