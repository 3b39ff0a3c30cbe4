"""The unmodified Trainer on models with other heads than a language model's, and on models that see."""

import numpy as np
import pytest
import transformers

from hf_sdp.bench.support.models import TASKS
from tests.support.images import CONFIGS, TASK, text_and_image
from tests.support.trainer import losses_of, make_trainer
from tests.support.workers import run_workers

RUN = dict(max_steps=4, save_strategy="steps", save_steps=4, optim="sgd", learning_rate=0.1)
CLASSES = dict(task="sequence classification", model_type="bert")
IMAGES = dict(task=TASK, model_type="llava", **CONFIGS["llava"])
SDP = dict(level="block", coverage=0.5)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions.argmax(-1) == prediction.label_ids))}


def trainer_of(folder, sdp: dict | None, model: dict, arguments: dict):
    classifies = model["task"] == CLASSES["task"]
    trainer = make_trainer(folder, sdp, arguments, model, compute_metrics=accuracy if classifies else None)
    if not classifies:
        trainer.train_dataset, trainer.eval_dataset = images(range(64)), images(range(64, 70))
    return trainer


def images(rows: range) -> list[dict]:
    batches = (text_and_image("llava", row) for row in rows)
    return [{name: values[0] for name, values in batch.items()} for batch in batches]


def train(folder, sdp: dict, model: dict, **arguments):
    trainer = trainer_of(folder, sdp, model, {**RUN, **arguments})
    trainer.train()
    return losses_of(trainer.state.log_history), metrics_of(trainer)


def train_simulation(folder, sdp: dict, model: dict):
    return train(folder, {**sdp, "simulate": 2}, model, gradient_accumulation_steps=4, save_strategy="no")


def evaluate_plainly(folder, model: dict):
    trainer = trainer_of(folder / "plain", None, model, {})
    trainer.model = getattr(transformers, TASKS[model["task"]][1]).from_pretrained(folder / "checkpoint-4")
    return metrics_of(trainer)


def metrics_of(trainer) -> dict[str, float]:
    found = trainer.evaluate()
    return {name: found[name] for name in ("eval_loss", "eval_accuracy") if name in found}


@pytest.mark.parametrize("model", [CLASSES, pytest.param(IMAGES, marks=pytest.mark.long)], ids=["classes", "images"])
def test_the_trainer_equals_the_simulation_and_evaluates_what_it_saves(tmp_path, model):
    results = run_workers(train, tmp_path, SDP, model, world_size=2)
    plain = run_workers(evaluate_plainly, tmp_path, model, world_size=2)
    assert ("eval_accuracy" in plain[0]) == (model is CLASSES)
    for (losses, metrics), expected in zip(results, plain, strict=True):
        assert losses == results[0][0]
        assert metrics == pytest.approx(expected, abs=1e-6)
    losses, _ = run_workers(train_simulation, tmp_path / "simulated", SDP, model, world_size=1)[0]
    assert results[0][0] == pytest.approx(losses, abs=1e-4)
