"""The best checkpoint: found again, and kept."""

import json
from pathlib import Path

import pytest

from tests.support.resume import NEURON, RUN
from tests.support.trainer import make_trainer
from tests.support.workers import run_workers


def best_after_moving(folder):
    """The best checkpoint is found again in a run's folder that was moved."""
    arguments = {**RUN, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    trainer = make_trainer(f"{folder}/b", NEURON, {**arguments, "learning_rate": 5.0, "max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    return trainer.state.best_model_checkpoint, trainer.state.best_global_step


@pytest.mark.long
def test_the_best_checkpoint_is_found_in_a_folder_that_was_moved(tmp_path):
    run_workers(train_with_best, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    for folder, step in run_workers(best_after_moving, tmp_path):
        assert folder == str(tmp_path / "b" / f"checkpoint-{step}")


def train_with_best(folder):
    arguments = {**RUN, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    make_trainer(folder, NEURON, {**arguments, "learning_rate": 5.0, "max_steps": 2}).train()


def best_and_rotation(folder):
    arguments = dict(
        **RUN, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
        save_total_limit=1, learning_rate=3e-1,
    )  # fmt: skip
    arguments.update(save_steps=1, save_strategy="best")
    trainer = make_trainer(folder, NEURON, arguments)
    trainer.train()
    return trainer.state.best_model_checkpoint, trainer.state.best_metric


def test_best_is_a_folder_that_exists_and_is_in_its_own_record(tmp_path):
    best, metric = run_workers(best_and_rotation, tmp_path)[0]
    assert Path(best).parent == tmp_path and [p.name for p in tmp_path.iterdir()] == [Path(best).name]
    recorded = json.loads((Path(best) / "trainer_state.json").read_text())
    assert (recorded["best_model_checkpoint"], recorded["best_metric"]) == (best, metric)
