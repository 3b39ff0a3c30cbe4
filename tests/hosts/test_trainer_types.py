"""The unmodified Trainer on model types of all structures."""

import shutil

import pytest
import transformers

import hf_sdp
from hf_sdp.bench.support.models import TASKS
from tests.support.trainer import losses_of, make_trainer, norms_of
from tests.support.types import BLOCK, MODELS, NEURON, short
from tests.support.workers import run_workers

RUN = dict(max_steps=4, save_strategy="steps", save_steps=2, optim="sgd", learning_rate=0.1)


def train(folder, sdp: dict, model: dict, resume: bool = False, **arguments):
    hf_sdp.enable()
    trainer = make_trainer(folder, sdp, {**RUN, **arguments}, model)
    trainer.train(resume_from_checkpoint=resume)
    loss = trainer.evaluate()["eval_loss"]
    return losses_of(trainer.state.log_history), norms_of(trainer.state.log_history), loss


def train_simulation(folder, sdp: dict, model: dict):
    return train(folder, {**sdp, "simulate": 2}, model, gradient_accumulation_steps=4, save_strategy="no")


def evaluate_plainly(folder, model: dict):
    trainer = make_trainer(folder / "plain", None, {}, model)
    auto_class = getattr(transformers, TASKS[model["task"]][1])
    trainer.model = auto_class.from_pretrained(folder / "checkpoint-4")
    return trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("name", short("mixtral"))
@pytest.mark.parametrize("sdp", [BLOCK, pytest.param(NEURON | dict(coverage=0.5), marks=pytest.mark.long)], ids=str)
def test_the_trainer_equals_the_simulation_and_resumes(tmp_path, name, sdp):
    model = MODELS[name]
    whole = run_workers(train, tmp_path / "whole", sdp, model, world_size=2)
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "parted" / "checkpoint-2")
    assert run_workers(train, tmp_path / "parted", sdp, model, True, world_size=2) == whole
    # In as large a world: where a model ignores the number of tokens, the Trainer's loss is multiplied by its size.
    plain = run_workers(evaluate_plainly, tmp_path / "whole", model, world_size=2)
    assert [of_rank[2] for of_rank in whole] == pytest.approx(plain, abs=1e-6)
    losses, norms, _ = run_workers(train_simulation, tmp_path / "simulated", sdp, model, world_size=1)[0]
    assert whole[0][0] == pytest.approx(losses, abs=1e-4)
    assert whole[0][1] == pytest.approx(norms, rel=1e-4)
