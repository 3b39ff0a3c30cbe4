"""TRL's trainers as they are. They replace the model's forward, call its base, and read the head without calling it."""

import math
import os

import pytest
import torch

from hf_sdp import SDPCallback, SDPConfig, patch_model
from tests.support.models import VOCAB, tiny_model
from tests.support.trainer import losses_of
from tests.support.workers import run_workers

pytest.importorskip("trl")

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # of every worker
ARGUMENTS = dict(
    per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=3, gradient_accumulation_steps=2,
    learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=0,
    lr_scheduler_type="constant", max_length=16, bf16=False, gradient_checkpointing=False,
)  # fmt: skip


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2")


def text(generator: torch.Generator, length: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def rows(kind: str, num_rows: int, seed: int):
    from datasets import Dataset

    g = torch.Generator().manual_seed(seed)
    if kind == "sft":
        return Dataset.from_list([{"text": text(g, 12 if row % 3 else 7)} for row in range(num_rows)])
    return Dataset.from_list(
        [{"prompt": text(g, 4), "chosen": " " + text(g, 6), "rejected": " " + text(g, 5)} for _ in range(num_rows)]
    )


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
