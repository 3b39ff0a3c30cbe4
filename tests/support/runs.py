"""Runs of the unmodified Trainer that belong together: at once, resumed, simulated, and its checkpoint without SDP."""

import shutil

import pytest
import transformers

import hf_sdp
from hf_sdp.bench.support.models import TASKS
from tests.support.models import tiny_model
from tests.support.trainer import losses_of, make_trainer, norms_of
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
    if "lora" in model:
        from peft import PeftModel

        base = tiny_model(**{name: value for name, value in model.items() if name != "lora"})
        trainer.model = PeftModel.from_pretrained(base, folder / "checkpoint-4")
    else:
        auto_class = getattr(transformers, TASKS[model["task"]][1])
        trainer.model = auto_class.from_pretrained(folder / "checkpoint-4")
    return trainer.evaluate()["eval_loss"]


def train_resume_and_reload(folder, sdp: dict, model: dict):
    """Losses, norms of gradients and the loss in evaluation: of two workers, and of their simulation.

    Here it is checked that the workers, resumed in the middle, come to the same, and that the last checkpoint, loaded
    without SDP, evaluates as they do.
    """
    whole = run_workers(train, folder / "whole", sdp, model, world_size=2)
    shutil.copytree(folder / "whole" / "checkpoint-2", folder / "parted" / "checkpoint-2")
    assert run_workers(train, folder / "parted", sdp, model, True, world_size=2) == whole
    # In as large a world: where a model ignores the number of rows, the Trainer's loss is multiplied by its size.
    plain = run_workers(evaluate_plainly, folder / "whole", model, world_size=2)
    assert [of_rank[2] for of_rank in whole] == pytest.approx(plain, abs=1e-6)
    return whole[0], run_workers(train_simulation, folder / "simulated", sdp, model, world_size=1)[0]
