"""A forward in eval mode that not all workers come to."""

import math
import re
import time

import pytest

from hf_sdp import SDPStateError
from tests.support.trainer import Rows, make_trainer
from tests.support.workers import run_workers

TIMEOUTS_S = {"train": 100, "nothing": 3}
"""Of the wait for the others. That they have gone on to training is told at once, so that its timeout plays no part."""


def forward_on_rank_0_only(folder, others: str):
    trainer = make_trainer(folder, dict(evaluation_timeout_s=TIMEOUTS_S[others]), dict(max_steps=1))
    trainer.train()
    batch = trainer._prepare_inputs({"input_ids": Rows(1).ids, "labels": Rows(1).labels})
    began = time.monotonic()
    if trainer.is_world_process_zero():
        trainer.model.eval()
        with pytest.raises(SDPStateError, match="a forward in eval mode is a collective") as raised:
            trainer.model(**batch)
        trainer.model.train()
        message, seconds = str(raised.value), time.monotonic() - began
        if others == "train":
            trainer.model(**batch)  # the others wait here
        return message, seconds
    if others == "train":
        trainer.model.train()
        trainer.model(**batch)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ("train", "has gone on to a forward in training mode"),
        ("nothing", r"ranks \[1, 2, 3\] have not come to it within 3 s"),
    ],
)
def test_a_forward_on_one_worker_only_is_an_error_there_within_seconds(tmp_path, others, message):
    said, seconds = run_workers(forward_on_rank_0_only, tmp_path, others)[0]
    # 30 s: far from the 100 s that nobody may wait for, and enough on a busy machine.
    assert re.search(message, said) and seconds < 30


def uneven_evaluation(folder):
    """Rank 0 has one batch more than the others, which go on to training."""
    trainer = make_trainer(folder, dict(), dict(max_steps=1))
    trainer.train()
    model, batch = trainer.model, trainer._prepare_inputs({"input_ids": Rows(1).ids, "labels": Rows(1).labels})
    model.eval()
    model(**batch)
    if trainer.is_world_process_zero():
        with pytest.raises(SDPStateError, match="has gone on to a forward in training mode"):
            model(**batch)
    model.train()
    loss = model(**batch).loss.item()
    trainer.state.global_step = 7
    trainer._save_checkpoint(model, None)  # after the error has been dealt with, all are in step again
    return loss


def test_uneven_evaluation_is_an_error_and_nobody_is_left_waiting(tmp_path):
    assert all(math.isfinite(loss) for loss in run_workers(uneven_evaluation, tmp_path))
    assert (tmp_path / "checkpoint-7").is_dir()
