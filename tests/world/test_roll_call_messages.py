"""How much workers say to the store, and what they hear of those that do not come."""

import threading
import time
import weakref
from collections import Counter

import pytest
import torch.distributed as dist

from hf_sdp import SDPStateError
from hf_sdp.world import roll_call
from hf_sdp.world.roll_call import RollCall


def world(size: int, timeout_s: float, monkeypatch) -> list[RollCall]:
    """All workers of one world, in one process."""
    store, calls = dist.HashStore(), []
    for rank in range(size):
        monkeypatch.setattr(roll_call, "_numbers", iter([0]))
        calls.append(RollCall(store, rank, size, timeout_s))
    return calls


class Counting:
    def __init__(self, store: dist.Store):
        self.store, self.calls = store, Counter()

    def __getattr__(self, name: str):
        self.calls[name] += 1
        return getattr(self.store, name)


def in_threads(calls: list[RollCall], work) -> None:
    threads = [threading.Thread(target=work, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def test_a_worker_sends_as_many_messages_however_many_others_there_are(monkeypatch):
    calls = world(24, 60, monkeypatch)
    for call in calls:
        call.store = Counting(call.store)
    rounds = 3
    in_threads(calls, lambda call: [call.wait("a forward in eval mode") for _ in range(rounds)])
    sent = Counter()
    for call in calls:
        calls_of_one = call.store.calls
        assert sum(n for name, n in calls_of_one.items() if name not in ("check", "multi_get")) <= 5 * rounds
        sent += calls_of_one
    assert sent["add"] == 24 * rounds
    # Nothing is left of the calls before the last one: one post for each worker, two keys of the last call.
    assert calls[0].store.store.num_keys() == 24 + 2


def test_who_is_missing_is_told_and_where_it_was_last(monkeypatch):
    calls = world(12, 0.2, monkeypatch)
    for call in calls:
        call.announce("a forward in training mode")
    calls[0].announce("a second forward")
    calls[1].announce("a second forward")
    with pytest.raises(SDPStateError) as raised:
        calls[0].wait("a forward in eval mode")
    said = str(raised.value)
    assert "ranks [1, 2, 3, 4, 5, 6, 7, 8] and 3 more have not come to it within 0.2 s" in said
    assert "They were last at: ['a forward in training mode', 'a second forward']" in said
    calls[2].announce("its own thing")
    for call in calls[1:]:  # what was given up is not counted: all are in step again
        call.count = calls[0].count
    calls[0].timeout_s = 60
    in_threads(calls, lambda call: call.wait("a forward in eval mode"))


def test_who_has_gone_on_is_an_error_at_once(monkeypatch):
    calls = world(2, 60, monkeypatch)
    calls[1].announce("a forward in training mode")
    with pytest.raises(SDPStateError, match="rank 1 has gone on to a forward in training mode"):
        calls[0].wait("a forward in eval mode")


def test_a_worker_with_more_batches_is_told_from_one_that_has_gone_on(monkeypatch):
    calls = world(2, 60, monkeypatch)
    calls[0].announce("a forward in training mode")
    calls[0].announce("logging the loss")
    with pytest.raises(SDPStateError, match="rank 0 has come to it after 1 more forwards .* Give every worker as many"):
        calls[1].wait("logging the loss")
    roll_call._say_goodbye(weakref.ref(calls[1]))  # it ends, and rank 0, which is ahead of it, does not wait for it
    with pytest.raises(SDPStateError, match="rank 1 has gone on to the end of its process"):
        calls[0].wait("logging the loss")


def test_what_workers_do_not_agree_on_is_an_error_on_one_that_waits(monkeypatch):
    calls = world(2, 60, monkeypatch)
    errors = []

    def work(call: RollCall) -> None:
        try:
            call.wait("a forward in eval mode", how=" with new weights" if call.rank else "")
        except SDPStateError as error:
            errors.append(str(error))
            call.announce("the end of its process")

    in_threads(calls, work)
    assert len(errors) == 2 and any("gone on to a forward in eval mode" in error for error in errors)


class SlowToLook(Counting):
    """A worker that asks whether all have come only when another one is already somewhere else."""

    def __init__(self, store: dist.Store, has_gone_on: threading.Event):
        super().__init__(store)
        self.has_gone_on = has_gone_on

    def check(self, keys: list[str]) -> bool:
        if not self.has_gone_on.is_set():
            assert self.has_gone_on.wait(30)
            time.sleep(0.02)
            return False  # it had asked before
        return self.store.check(keys)


@pytest.mark.parametrize("next_thing", ["wait", "announce"])
def test_who_has_been_here_may_have_gone_on(monkeypatch, next_thing):
    calls, has_gone_on, errors = world(2, 60, monkeypatch), threading.Event(), []
    calls[0].store = SlowToLook(calls[0].store, has_gone_on)

    def work(call: RollCall) -> None:
        try:
            while call.rank == 1 and not call.store.check(["1/saving"]):  # comes last, and goes on at once
                time.sleep(0.001)
            call.wait("saving")
            if call.rank == 1:
                post = call._post
                call._post = lambda: (post(), has_gone_on.set())
            getattr(call, next_thing)("the next thing")
        except SDPStateError as error:
            errors.append(error)

    in_threads(calls, work)
    assert not errors
