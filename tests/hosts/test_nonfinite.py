"""The vote before an optimizer's step: a loss or gradient that is not finite, and workers at different steps."""

import math

import pytest
import torch
import torch.distributed as dist
from transformers import TrainerCallback

from hf_sdp import SDPStateError, consolidate
from hf_sdp.engine.sharded import find_sharded
from hf_sdp.model.state import local_tensor
from tests.support.models import batch
from tests.support.trainer import make_trainer
from tests.support.training import prepared
from tests.support.workers import run_workers

ODD = 2  # the rank where it happens


def spoil_a_loss(trainer, step: int):
    """Under the Trainer: of rank ODD, in the second micro-batch of a step."""
    original, calls = trainer.compute_loss, []

    def compute_loss(*args, **kwargs):
        calls.append(1)
        loss = original(*args, **kwargs)
        return loss * math.nan if dist.get_rank() == ODD and len(calls) == 2 * step else loss

    trainer.compute_loss = compute_loss


class Record(TrainerCallback):
    """Whether each step was skipped, and the learning rate after it."""

    def __init__(self):
        self.seen = []

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        self.seen.append((optimizer.step_was_skipped, lr_scheduler.last_epoch))


class Another(TrainerCallback):
    """Rank ODD believes to be elsewhere."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if dist.get_rank() == ODD:
            state.global_step += 5


def under_the_trainer(folder):
    trainer = make_trainer(folder, dict(), dict(max_grad_norm=0.0))
    spoil_a_loss(trainer, step=2)
    with pytest.raises(SDPStateError) as raised:
        trainer.train()
    said = [str(raised.value)]
    assert trainer.state.global_step == 1
    weights = consolidate(trainer.model)
    assert weights is None or all(t.isfinite().all() for t in weights.values())

    trainer = make_trainer(folder, dict())
    trainer.callback_handler.callbacks.insert(0, Another())
    with pytest.raises(SDPStateError) as raised:
        trainer.train()
    said.append(str(raised.value))

    trainer = make_trainer(folder, dict(on_nonfinite="skip"), dict(lr_scheduler_type="linear"))
    spoil_a_loss(trainer, step=2)
    trainer.add_callback(record := Record())
    trainer.train()
    weights = consolidate(trainer.model)
    assert weights is None or all(t.isfinite().all() for t in weights.values())
    assert all(int(s["step"]) == 3 for s in trainer.optimizer.state.values())
    return said, record.seen


def test_under_the_trainer(tmp_path):
    results = run_workers(under_the_trainer, tmp_path)
    assert all(result == results[0] for result in results)
    (loss, step), seen = results[0]
    assert "Step 2: the loss is nan on rank 2" in loss
    assert "Workers are at different steps: rank 0 at 1, rank 2 at 6." in step
    assert seen == [(False, 1), (True, 1), (False, 2), (False, 3)]  # the scheduler waits as well


def in_a_loop():
    said = []
    for clips in (False, True):
        accelerator, model, optimizer = prepared(dict(level="block"))
        before = consolidate(model)
        accelerator.backward(model(**batch(dist.get_rank())).loss)
        if dist.get_rank() == ODD:
            local_tensor(next(iter(find_sharded(model).parameters.values())).grad).fill_(math.inf)
        if clips:
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
        with pytest.raises(SDPStateError) as raised:
            optimizer.step()
        said.append(str(raised.value))
        after = consolidate(model)
        assert before is None or all(torch.equal(before[n], t) for n, t in after.items())
    accelerator, model, optimizer = prepared(dict(on_nonfinite="skip"))
    skipped = []
    for step in range(3):
        loss = model(**batch(step * 4 + dist.get_rank())).loss
        accelerator.backward(loss * math.inf if step == 1 and dist.get_rank() == ODD else loss)
        optimizer.step()
        skipped.append(accelerator.optimizer_step_was_skipped)
        optimizer.zero_grad()
    weights = consolidate(model)
    assert weights is None or all(t.isfinite().all() for t in weights.values())
    optimizer.zero_grad()
    accelerator.backward(model(**batch(dist.get_rank())).loss * math.nan)
    optimizer.zero_grad()  # seen by the loop itself
    accelerator.backward(model(**batch(dist.get_rank())).loss)
    optimizer.step()
    skipped.append(accelerator.optimizer_step_was_skipped)
    accelerator, model, optimizer = prepared(dict(on_nonfinite="ignore"))
    accelerator.backward(model(**batch(dist.get_rank())).loss * math.nan)
    optimizer.step()
    return said, skipped


def test_in_a_loop_of_ones_own():
    results = run_workers(in_a_loop)
    assert all(result == results[0] for result in results)
    (alone, clipped), skipped = results[0]
    assert "Step 1: all losses are finite, but the gradients are not, as ranks [2] see" in alone
    assert "as ranks [0, 1, 2, 3] see" in clipped
    assert skipped == [False, True, False, False]
