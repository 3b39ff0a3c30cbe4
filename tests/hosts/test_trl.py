"""TRL's trainers as they are. They replace the model's forward, call its base, and read the head without calling it."""

import math

import pytest

from hf_sdp import SDPCallback, SDPConfig, patch_model
from tests.support.models import tiny_model
from tests.support.trainer import losses_of
from tests.support.trl import ARGUMENTS, rows, tokenizer
from tests.support.workers import run_workers

pytest.importorskip("trl")


def make_trainer(kind: str, folder, sdp: dict | None, model=None):
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    config, trainer, other = (SFTConfig, SFTTrainer, {}) if kind == "sft" else (DPOConfig, DPOTrainer, {})
    args = config(output_dir=str(folder), **ARGUMENTS)
    net = tiny_model() if model is None else model
    if sdp is not None:
        net = patch_model(net, SDPConfig(**sdp))
        other = {"callbacks": [SDPCallback()]}
    if kind == "dpo":
        other["ref_model"] = tiny_model()
    return trainer(
        model=net, args=args, train_dataset=rows(kind, 64, 0), eval_dataset=rows(kind, 12, 1),
        processing_class=tokenizer(), **other,
    )  # fmt: skip


def train(kind: str, folder, sdp: dict | None):
    trainer = make_trainer(kind, folder, sdp)
    trainer.train()
    return losses_of(trainer.state.log_history), trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("sharding", ["full", pytest.param("none", marks=pytest.mark.long)])
def test_training_with_everything_held_equals_ddp(tmp_path, kind, sharding):
    ddp_losses, ddp_loss = run_workers(train, kind, tmp_path / "ddp", None)[0]
    losses, loss = run_workers(train, kind, tmp_path / "sdp", dict(coverage=1.0, sharding=sharding))[0]
    assert losses == pytest.approx(ddp_losses, rel=1e-4)
    assert loss == pytest.approx(ddp_loss, rel=1e-4)


def train_and_reload(kind: str, folder, sdp: dict):
    """Evaluation of the patched model, and that of the folder it saves, which knows nothing of hf_sdp."""
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(kind, folder, sdp)
    trainer.train()
    trainer.save_model()
    loss = trainer.evaluate()["eval_loss"]  # all wait for rank 0, which saves
    saved = make_trainer(kind, folder / "plain", None, AutoModelForCausalLM.from_pretrained(folder))
    return loss, saved.evaluate()["eval_loss"]


@pytest.mark.parametrize(
    ("kind", "level"),
    [
        ("sft", "neuron"),
        ("dpo", "block"),
        pytest.param("sft", "block", marks=pytest.mark.long),
        pytest.param("dpo", "neuron", marks=pytest.mark.long),
    ],
)
def test_evaluation_is_that_of_the_saved_model(tmp_path, kind, level):
    for loss, of_saved in run_workers(train_and_reload, kind, tmp_path, dict(level=level, coverage=0.5)):
        assert loss == pytest.approx(of_saved, rel=1e-6)


def test_a_loss_against_a_reference_starts_at_its_own_under_backward_masking(tmp_path):
    """The forward that trains is then the full model's, as the reference is."""
    losses, _ = run_workers(train, "dpo", tmp_path, dict(coverage=0.5, masking="backward"))[0]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5) and losses[-1] < losses[0]
