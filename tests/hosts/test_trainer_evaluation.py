"""The unmodified Trainer evaluates the full model, or a subnetwork where that is asked for."""

import math
from pathlib import Path

import pytest
import torch

from hf_sdp import local_state_dict
from tests.support.models import tiny_model
from tests.support.trainer import Rows, make_trainer
from tests.support.workers import run_workers


def evaluate_subnetworks(folder):
    trainer = make_trainer(folder, dict(evaluate="subnetwork"), dict(max_steps=1))
    trainer.train()
    several = dict(a=Rows(8, seed=2), b=Rows(8, seed=3))
    one, given = trainer.evaluate(), trainer.evaluate(several)
    trainer.eval_dataset = several
    return one, given, trainer.evaluate(), trainer.predict(Rows(8, seed=2)).metrics


def test_the_metrics_of_a_subnetwork_are_named_so(tmp_path):
    results = run_workers(evaluate_subnetworks, tmp_path)[0]
    names = [{name for name in metrics if name.endswith("loss")} for metrics in results]
    several = {"eval_subnetwork_a_loss", "eval_subnetwork_b_loss"}
    assert names == [{"eval_subnetwork_loss"}, several, several, {"test_subnetwork_loss"}]
    assert all("subnetwork" in name for metrics in results for name in metrics if name.startswith(("eval", "test")))


def evaluate_first(folder):
    """Evaluation before and after training, twice over: prepare and hooks must not be done twice."""
    trainer = make_trainer(folder, dict(), dict(max_steps=2, gradient_accumulation_steps=1, eval_on_start=True))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    first = trainer.model._sdp_state.run.version
    trainer.train()
    return before, first, trainer.model._sdp_state.run.version, trainer.state.log_history[0]


def test_evaluate_before_train_and_train_twice(tmp_path):
    for before, first, second, _ in run_workers(evaluate_first, tmp_path):
        assert before == pytest.approx(untrained_loss(), abs=1e-5)
        assert (first, second) == (2, 4)


def untrained_loss() -> float:
    rows, model = Rows(24, seed=1), tiny_model().eval()
    with torch.no_grad():
        return model(input_ids=rows.ids, labels=rows.ids).loss.item()


def generate(folder):
    from hf_sdp import consolidate

    trainer = make_trainer(folder, dict(), dict(max_steps=1))
    trainer.train()
    model, ids = trainer.model.eval(), Rows(1).ids[:, :4]
    generated = model.generate(ids, max_new_tokens=5, do_sample=False, synced_gpus=True, pad_token_id=0)
    weights = consolidate(model)
    if weights is not None:
        plain = tiny_model().eval()
        plain.load_state_dict(weights)
        assert torch.equal(plain.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), generated)
    return generated.tolist()


def test_generation_on_all_workers_is_that_of_the_full_model(tmp_path):
    results = run_workers(generate, tmp_path)
    assert all(r == results[0] for r in results)


def evaluate_unevenly_alone(folder):
    """A subnetwork that a worker has whole: how often it is evaluated is nobody else's business."""
    trainer = make_trainer(folder, dict(evaluate="subnetwork", sharding="none"), dict(max_steps=1))
    trainer.train()
    batch = trainer._prepare_inputs({"input_ids": Rows(1).ids, "labels": Rows(1).labels})
    trainer.model.eval()
    for _ in range(trainer.args.process_index):
        trainer.model(**batch)
    trainer.state.global_step = 7
    trainer._save_checkpoint(trainer.model, None)


def test_a_forward_of_a_whole_subnetwork_is_local(tmp_path):
    run_workers(evaluate_unevenly_alone, tmp_path)
    assert (tmp_path / "checkpoint-7").is_dir()


def metrics_of_the_evaluate_library(folder):
    import datasets
    import evaluate

    class TokenAccuracy(evaluate.Metric):
        """Defined here: the library's own are downloaded."""

        def _info(self):
            features = datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            )
            return evaluate.MetricInfo(description="", citation="", features=features)

        def _compute(self, predictions, references):
            return {"accuracy": sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)}

    metric = TokenAccuracy(experiment_id=f"{Path(folder).name}-{torch.distributed.get_rank()}", cache_dir=str(folder))

    def compute(prediction):
        guesses = prediction.predictions[:, :-1].argmax(-1)
        return metric.compute(predictions=guesses.flatten(), references=prediction.label_ids[:, 1:].flatten())

    trainer = make_trainer(folder, dict(), dict(max_steps=2), compute_metrics=compute)
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(f"{folder}/out")
    return accuracy


def test_compute_metrics_sees_the_full_model(tmp_path):
    pytest.importorskip("evaluate")
    from transformers import AutoModelForCausalLM

    results = run_workers(metrics_of_the_evaluate_library, tmp_path)
    rows = Rows(24, seed=1).ids
    with torch.no_grad():
        guesses = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=rows).logits[:, :-1].argmax(-1)
    assert results == [pytest.approx((guesses == rows[:, 1:]).float().mean().item(), abs=1e-6)] * 4


def state_dict_on_one_worker(folder):
    """Anything on rank 0 may call state_dict() between an evaluation and the next step."""
    trainer = make_trainer(folder, dict(), dict(max_steps=1))
    trainer.train()
    trainer.evaluate()
    if trainer.is_world_process_zero():
        local_state_dict(trainer.model)
    trainer.model.train()
    return trainer.model(**trainer._prepare_inputs({"input_ids": Rows(1).ids, "labels": Rows(1).labels})).loss.item()


def test_a_state_dict_on_one_worker_does_not_disturb_the_others(tmp_path):
    assert all(math.isfinite(loss) for loss in run_workers(state_dict_on_one_worker, tmp_path))
