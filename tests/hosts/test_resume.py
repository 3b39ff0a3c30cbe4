"""Stopping and continuing: exactly, in another world, under another plan, and from and to plain training."""

import json
import shutil

import pytest
import torch

import hf_sdp
from hf_sdp.checkpoint.folder import newest_complete
from tests.support.resume import NEURON, RUN, assert_equal, optimizer_of, train, truncate, weights_of
from tests.support.trainer import losses_of, make_trainer
from tests.support.workers import run_workers


def _runs():
    """Each config with both optimizers; by default one of them in some of the configs."""
    configs = [
        dict(level=level, masking=masking) for level in ("neuron", "block") for masking in ("forward", "backward")
    ]
    configs.append(
        dict(coverage=[0.75, 0.5, 0.5, 0.25], sharding="none")
    )  # several parts of one parameter, other ones on each worker
    for index, config in enumerate(configs):
        for number, optimizer in enumerate(("adamw_torch_fused", "sgd")):
            marks = () if number == index % 2 and index in (0, 3) else pytest.mark.long
            yield pytest.param(config, optimizer, id=f"{config}-{optimizer}", marks=marks)


@pytest.mark.parametrize(("sdp", "optimizer"), list(_runs()))
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, sdp, optimizer):
    options = {"optim": optimizer, **({"optim_args": "momentum=0.9"} if optimizer == "sgd" else {})}
    whole = run_workers(train, tmp_path / "whole", sdp, options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "parted" / "checkpoint-3")
    rest = run_workers(train, tmp_path / "parted", sdp, options, True)
    assert rest == whole  # the log of the first steps is in the checkpoint
    assert_equal(weights_of(tmp_path / "whole/checkpoint-6"), weights_of(tmp_path / "parted/checkpoint-6"))
    assert_equal(optimizer_of(tmp_path / "whole/checkpoint-6"), optimizer_of(tmp_path / "parted/checkpoint-6"))


def load_and_save(folder, checkpoint, sdp, arguments=None):
    """Resume, and save before a step is taken; then go on."""
    from transformers import TrainerCallback

    class Saved(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trainer.state.global_step += 100  # a name of its own
            trainer._save_checkpoint(trainer.model, None)
            trainer.state.global_step -= 100

    hf_sdp.enable()
    trainer = make_trainer(folder, sdp, {**RUN, "save_strategy": "no", "max_steps": 5, **(arguments or {})})
    trainer.add_callback(Saved())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return losses_of(trainer.state.log_history)


PARTS = dict(level="neuron", coverage=0.75)
UNEQUAL = dict(level="block", coverage=[0.75, 0.5, 0.5, 0.5], always_held=[0])


@pytest.mark.parametrize(
    ("written", "wrote_world", "read", "read_world"),
    [
        (NEURON, 4, dict(level="block", coverage=0.5), 2),
        pytest.param(NEURON, 4, dict(coverage=1.0), 4, marks=pytest.mark.long),
        pytest.param(NEURON, 4, None, 1, marks=pytest.mark.long),
        pytest.param(dict(level="block", coverage=0.5), 4, dict(masking="backward"), 4, marks=pytest.mark.long),
        (dict(level="block", block_granularity="layer"), 4, {**PARTS, "sharding": "none"}, 4),
        pytest.param(dict(masking="backward"), 4, {**NEURON, "num_subnetworks": 2}, 4, marks=pytest.mark.long),
        (None, 1, UNEQUAL, 4),
        pytest.param(None, 4, dict(level="block"), 4, marks=pytest.mark.long),
        pytest.param(UNEQUAL, 4, dict(coverage=0.5), 2, marks=pytest.mark.long),
        pytest.param(dict(coverage=0.5), 2, dict(coverage=0.25), 4, marks=pytest.mark.long),
        pytest.param(NEURON, 4, None, 2, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_every_element_comes_over_into_another_world_and_plan(tmp_path, written, wrote_world, read, read_world, caplog):
    run_workers(train, tmp_path, written, dict(max_steps=3), world_size=wrote_world)
    checkpoint = tmp_path / "checkpoint-3"
    losses = run_workers(load_and_save, tmp_path / "read", checkpoint, read, world_size=read_world)
    again = tmp_path / "read" / "checkpoint-103"
    assert_equal(weights_of(checkpoint), weights_of(again))
    assert_equal(optimizer_of(checkpoint), optimizer_of(again))
    assert len(losses[0]) == 5 and all(loss == losses[0] for loss in losses)


def test_the_newest_complete_checkpoint_is_taken(tmp_path):
    run_workers(train, tmp_path, NEURON)
    assert newest_complete(tmp_path).endswith("checkpoint-6")
    marker = json.loads((tmp_path / "checkpoint-6" / "sdp_checkpoint.json").read_text())
    assert marker["world_size"] == 4 and marker["sdp_config"]["coverage"] == 0.5
    assert marker["versions"]["torch"] == torch.__version__
    plan = hf_sdp.Plan.from_json((tmp_path / "checkpoint-6" / "sdp_plan.json").read_text())
    assert plan.hash == marker["plan_hash"]
    truncate(tmp_path / "checkpoint-6" / "model.safetensors")
    assert newest_complete(tmp_path).endswith("checkpoint-3")
    losses, _ = run_workers(train, tmp_path, NEURON, None, True)[0]
    assert len(losses) == 6 and newest_complete(tmp_path).endswith("checkpoint-6")  # written anew in its place
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("_")] == []
