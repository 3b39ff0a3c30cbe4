"""Worker processes that fail, end, or say nothing."""

import os
import time

import pytest
import torch.distributed as dist

from hf_sdp.bench.workers import WorkerError, launch


def fail_on_rank_1():
    if dist.get_rank() == 1:
        raise ValueError("no luck")
    dist.barrier()


def end_on_rank_1():
    if dist.get_rank() == 1:
        os._exit(7)
    dist.barrier()


@pytest.mark.parametrize("function, reason", [(fail_on_rank_1, "no luck"), (end_on_rank_1, r"exit code 7")])
def test_a_worker_that_fails_ends_all(function, reason):
    with pytest.raises(WorkerError) as raised:
        launch(function, 2, timeout_s=60)
    assert raised.value.reason.startswith("rank 1: ") and reason in raised.value.reason


def test_workers_that_say_nothing():
    with pytest.raises(WorkerError, match="no word from ranks"):
        launch(time.sleep, 1, 60, timeout_s=5)
