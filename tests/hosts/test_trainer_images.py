"""The unmodified Trainer on models for images; of those with batch norms, evaluation and checkpoints have the running
statistics of all holders."""

import pytest
import torch

import hf_sdp
from hf_sdp import SDPStateError
from hf_sdp.bench.support.models import tiny_batch
from hf_sdp.model.state import get_state
from hf_sdp.model.statistics import batch_norms, holders_of
from tests.support.runs import RUN, evaluate_plainly, train_resume_and_reload
from tests.support.trainer import losses_of, make_trainer
from tests.support.workers import run_workers

TASK = "image classification"
BLOCK = dict(level="block", coverage=0.5)
RESNET = dict(task=TASK, model_type="resnet")
CASES = {
    "resnet": (RESNET, BLOCK),
    "resnet, backward": (RESNET, BLOCK | dict(masking="backward")),
    "resnet, neuron": (RESNET, dict(level="neuron", coverage=0.5)),
    "resnet, backward, neuron": (RESNET, dict(level="neuron", coverage=0.5, masking="backward")),
    "resnet, several parts": (RESNET, dict(level="neuron", coverage=[0.75, 0.5])),
    "groups, several parts": (dict(task=TASK, model_type="regnet"), dict(level="neuron", coverage=[0.75, 0.5])),
    "biases, several parts": (dict(task=TASK, model_type="poolformer"), dict(level="neuron", coverage=[0.75, 0.5])),
    "vit": (dict(task=TASK, model_type="vit"), dict(level="neuron", coverage=0.5)),
    "convnext": (dict(task=TASK, model_type="convnext"), dict(level="neuron", coverage=0.5)),
    "swin": (dict(task=TASK, model_type="swin"), dict(level="neuron", coverage=0.5)),
}
SHORT = ("resnet", "resnet, neuron", "vit")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SHORT else pytest.mark.long) for name in CASES]
)
def test_the_trainer_equals_the_simulation_and_resumes(tmp_path, name):
    model, sdp = CASES[name]
    (losses, norms, loss), simulated = train_resume_and_reload(tmp_path, sdp, model)
    assert losses == pytest.approx(simulated[0], rel=2e-4)
    assert norms == pytest.approx(simulated[1], rel=1e-3)
    # Where a model ignores the number of rows, the Trainer's loss is multiplied by the size of the world.
    scale = 2 if model["model_type"] in ("poolformer", "regnet", "resnet") else 1
    assert loss == pytest.approx(scale * simulated[2], rel=5e-4)


def train_recalibrated(folder, number: int | None):
    hf_sdp.enable()
    arguments = RUN | dict(eval_strategy="steps", eval_steps=2)
    trainer = make_trainer(folder, BLOCK | dict(recalibrate_batches=number), arguments, RESNET)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    again = [trainer.evaluate()["eval_loss"] for _ in range(2)]
    return losses_of(trainer.state.log_history), evaluated, again


def test_statistics_are_estimated_anew_before_each_evaluation(tmp_path):
    """The same batches are trained as without it, and the checkpoint has what was evaluated."""
    losses, evaluated, again = run_workers(train_recalibrated, tmp_path / "recalibrated", 2, world_size=2)[0]
    others, means, _ = run_workers(train_recalibrated, tmp_path / "means", None, world_size=2)[0]
    assert losses == others
    assert all(abs(one - other) > 1e-3 for one, other in zip(evaluated, means, strict=True))
    assert again == pytest.approx([evaluated[-1]] * 2, abs=1e-6)
    plain = run_workers(evaluate_plainly, tmp_path / "recalibrated", RESNET, world_size=2)
    assert plain == pytest.approx([evaluated[-1]] * 2, abs=1e-6)


def statistics_of_workers(folder):
    hf_sdp.enable()
    trainer = make_trainer(folder, BLOCK, RUN | dict(save_strategy="no"), RESNET)
    trainer.train()
    model = trainer.model.train()
    model(**tiny_batch(model, 100 + trainer.args.process_index, task=TASK))
    own = {name: norm.running_mean.clone() for name, norm in batch_norms(model).items()}
    hf_sdp.verify(model)
    averaged = {name: norm.running_mean.clone() for name, norm in batch_norms(model).items()}
    batches = [tiny_batch(model, 200 + 10 * trainer.args.process_index + n, task=TASK) for n in range(2)]
    hf_sdp.recalibrate(model, batches, 2)
    recalibrated = {name: norm.running_mean.clone() for name, norm in batch_norms(model).items()}
    hf_sdp.verify(model)
    weights = hf_sdp.consolidate(model)
    if trainer.args.process_index == 1:
        next(iter(batch_norms(model).values())).running_mean.add_(1)
    with pytest.raises(SDPStateError, match="rank 1: resnet.*running_mean differs from that of rank 0 by up to 1"):
        hf_sdp.verify(model)
    return own, averaged, recalibrated, batches, weights


def statistics_of_rank_0(folder):
    hf_sdp.enable()
    trainer = make_trainer(folder, BLOCK | dict(average_shared_statistics=False), RUN | dict(max_steps=1), RESNET)
    trainer.train()
    model = trainer.model.train()
    model(**tiny_batch(model, 100 + trainer.args.process_index, task=TASK))
    plan, norms = get_state(model).held.plan, batch_norms(model)
    own = {name: norm.running_var.clone() for name, norm in norms.items()}
    hf_sdp.verify(model)
    read = {name: norm.running_var.clone() for name, norm in norms.items()}
    holders = {name: holders_of(plan, name, len(norm.running_var))[:, 0].tolist() for name, norm in norms.items()}
    return own, read, holders


def test_running_statistics_of_all_are_those_of_rank_0_where_that_is_asked_for(tmp_path):
    """Those of norms that one worker holds are that worker's."""
    (own, read, holders), (other, read_there, _) = run_workers(statistics_of_rank_0, tmp_path, world_size=2)
    assert {tuple(held) for held in holders.values()} == {(True, True), (True, False), (False, True)}
    for name, held in holders.items():
        assert not torch.equal(own[name], other[name])
        torch.testing.assert_close(read[name], own[name] if held[0] else other[name], rtol=0, atol=0)
        torch.testing.assert_close(read_there[name], read[name], rtol=0, atol=0)


def test_running_statistics_are_the_mean_over_holders_and_can_be_estimated_anew(tmp_path):
    (own, averaged, recalibrated, batches, weights), other = run_workers(statistics_of_workers, tmp_path, world_size=2)
    held_by_one = 0
    for name, mean in averaged.items():
        candidates = {"both": (own[name] + other[0][name]) / 2, "one": own[name], "other": other[0][name]}
        which = [who for who, expected in candidates.items() if torch.allclose(mean, expected, atol=1e-7)]
        assert len(which) == 1
        held_by_one += which != ["both"]
        torch.testing.assert_close(other[1][name], mean, rtol=0, atol=0)
    assert 0 < held_by_one < len(averaged)
    dense = make_trainer(tmp_path, None, {}, RESNET).model.train()
    dense.load_state_dict(weights)
    for norm in batch_norms(dense).values():
        norm.momentum = None
        norm.reset_running_stats()
    for batch in (*batches, *other[3]):
        dense(**batch)
    for name, norm in batch_norms(dense).items():
        torch.testing.assert_close(recalibrated[name], norm.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights[f"{name}.running_mean"], recalibrated[name])
