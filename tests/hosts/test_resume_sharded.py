"""A model that comes sharded, under the Trainer, which would make a group of the optimizer for each mesh, where workers
have other meshes. Groups are those of the full model, also in a checkpoint."""

import json
import shutil

import pytest
from transformers import Trainer

import hf_sdp
from hf_sdp import SDPCallback, SDPConfig
from hf_sdp.checkpoint.marker import OPTIMIZER
from hf_sdp.checkpoint.saved_optimizer import GROUPS
from tests.support.models import tiny_model
from tests.support.resume import RUN, assert_equal, optimizer_of, weights_of
from tests.support.trainer import losses_of, make_trainer, norms_of
from tests.support.workers import run_workers

OPTIONS = dict(weight_decay=0.1)
UNEVEN = dict(level="block", coverage=[0.75, 0.5, 0.25])  # some have more meshes than others


def train_sharded(folder, model, sdp: dict, resume=None):
    trainer = make_trainer(folder, None, RUN | OPTIONS)
    callback, net = SDPCallback(), hf_sdp.from_pretrained(model, SDPConfig(**sdp)).train()
    trainer = Trainer(net, trainer.args, train_dataset=trainer.train_dataset, callbacks=[callback])
    trainer.train(resume_from_checkpoint=resume)
    return losses_of(trainer.state.log_history), norms_of(trainer.state.log_history)


@pytest.fixture
def stored(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("sdp", [UNEVEN, pytest.param(dict(coverage=2 / 3), marks=pytest.mark.long)], ids=str)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, stored, sdp):
    whole = run_workers(train_sharded, tmp_path / "whole", stored, sdp, world_size=3)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "parted" / "checkpoint-3")
    assert run_workers(train_sharded, tmp_path / "parted", stored, sdp, True, world_size=3) == whole
    last, again = (tmp_path / run / "checkpoint-6" for run in ("whole", "parted"))
    assert_equal(weights_of(again), weights_of(last))
    assert_equal(optimizer_of(again), optimizer_of(last))
    decay, others = json.loads((last / OPTIMIZER / GROUPS).read_text())["groups"]
    assert (decay["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert others["params"] == [name for name, _ in tiny_model().named_parameters() if "norm" in name]
    assert {*decay["params"], *others["params"]} == {name for name, _ in tiny_model().named_parameters()}
