"""The unmodified Trainer with real workers."""

import json
import math
from pathlib import Path

import pytest
import torch
from models import VOCAB, tiny_model
from workers import run_workers

from hf_sdp import SDPCallback, SDPConfig, SDPConfigError, SDPStateError, patch_model

ARGUMENTS = dict(
    per_device_train_batch_size=2, per_device_eval_batch_size=3, max_steps=4, gradient_accumulation_steps=2,
    max_grad_norm=0.5, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    use_cpu=True, seed=0, lr_scheduler_type="constant",
)  # fmt: skip


class Rows(torch.utils.data.Dataset):
    """Rows of random tokens; rows of different length (padded, ignored) when ``ragged``."""

    def __init__(self, num_rows: int, seed: int = 0, ragged: bool = False):
        g = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, VOCAB, (num_rows, 16), generator=g)
        self.labels = self.ids.clone()
        if ragged:
            for row, length in enumerate(torch.randint(4, 17, (num_rows,), generator=g).tolist()):
                self.labels[row, length:] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def make_trainer(folder, sdp: dict | None, arguments: dict | None = None, model: dict | None = None, ragged=False, **kwargs):
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(output_dir=str(folder), **{**ARGUMENTS, **(arguments or {})})
    net = tiny_model(seed=0 if sdp is None else args.process_index, **(model or {}))
    if sdp is not None:
        net = patch_model(net, SDPConfig(**sdp))
        kwargs["callbacks"] = [*kwargs.get("callbacks", []), SDPCallback()]
    return Trainer(model=net, args=args, train_dataset=Rows(64, ragged=ragged), eval_dataset=Rows(24, seed=1), **kwargs)


def train(folder, sdp, arguments=None, model=None, ragged=False):
    trainer = make_trainer(folder, sdp, arguments, model, ragged)
    result = trainer.train()
    return result.training_loss, trainer.evaluate()["eval_loss"], trainer.state.log_history


def losses_of(log_history) -> list[float]:
    return [entry["loss"] for entry in log_history if "loss" in entry]


def norms_of(log_history) -> list[float]:
    return [entry["grad_norm"] for entry in log_history if "grad_norm" in entry]


def train_and_save(folder, sdp, arguments=None, model=None):
    trainer = make_trainer(folder, sdp, arguments, model)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(f"{folder}/out")
    return metrics["eval_loss"], norms_of(trainer.state.log_history)


def full_loss(folder) -> float:
    """Evaluation loss of a checkpoint in plain transformers, one process, as the Trainer averages it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = Rows(24, seed=1)
    with torch.no_grad():
        losses = [model(input_ids=rows.ids[i : i + 1], labels=rows.ids[i : i + 1]).loss.item() for i in range(len(rows))]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("masking", ["forward", "backward"])
@pytest.mark.parametrize("level", ["neuron", "block"])
def test_evaluation_is_of_the_full_model_and_the_checkpoint_is_standard(tmp_path, level, masking):
    results = run_workers(train_and_save, tmp_path, dict(level=level, masking=masking, coverage=0.5), None, {"tie_word_embeddings": True})
    assert len({json.dumps(r) for r in results}) == 1  # loss and norms are the same on every rank
    assert results[0][0] == pytest.approx(full_loss(tmp_path / "out"), abs=1e-5)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == ["model.safetensors"]
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert set(f.keys()) == {n for n, _ in tiny_model(tie_word_embeddings=True).named_parameters()}  # tied: once
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_full_coverage_equals_ddp(tmp_path):
    arguments = dict(max_steps=20, learning_rate=3e-3)
    ddp = run_workers(train, tmp_path, None, arguments)
    for sharding in ("full", "none"):
        sdp = run_workers(train, tmp_path, dict(coverage=1.0, sharding=sharding), arguments)
        assert losses_of(sdp[0][2]) == pytest.approx(losses_of(ddp[0][2]), abs=1e-5)
        assert norms_of(sdp[0][2]) == pytest.approx(norms_of(ddp[0][2]), rel=1e-4)
        assert sdp[0][1] == pytest.approx(ddp[0][1], abs=1e-5)


@pytest.mark.parametrize("average", [True, False])
def test_token_counts_that_differ_between_workers_weigh_as_in_ddp(tmp_path, average):
    """The Trainer multiplies the loss by the number of processes when it averages tokens across devices."""
    arguments = dict(max_steps=6, average_tokens_across_devices=average)
    ddp = run_workers(train, tmp_path, None, arguments, None, True)
    sdp = run_workers(train, tmp_path, dict(coverage=1.0), arguments, None, True)
    assert losses_of(sdp[0][2]) == pytest.approx(losses_of(ddp[0][2]), abs=1e-5)
    assert norms_of(sdp[0][2]) == pytest.approx(norms_of(ddp[0][2]), rel=1e-4)


SUBNETWORKS = {
    "neuron": dict(level="neuron"),
    "block": dict(level="block"),
    "parts": dict(level="neuron", coverage=0.75, reshard_after_forward=True),
    "backward": dict(level="neuron", masking="backward"),
}


@pytest.mark.parametrize(
    ("variant", "subnetwork"),
    [
        *(("gradient_checkpointing", s) for s in SUBNETWORKS),
        ("bf16", "parts"),
        ("bf16", "backward"),
        ("torch_compile", "neuron"),  # a minute: one is enough
    ],
)
def test_training_variants_keep_the_losses(tmp_path, variant, subnetwork):
    sdp = SUBNETWORKS[subnetwork]
    options = {
        "gradient_checkpointing": dict(gradient_checkpointing=True),
        "bf16": dict(bf16=True),
        "torch_compile": dict(torch_compile=True, torch_compile_backend="aot_eager"),
    }[variant]
    plain, varied = (
        run_workers(train, tmp_path, sdp, arguments, timeout_s=280) for arguments in ({}, options)
    )
    tolerance = 2e-2 if variant == "bf16" else 1e-5
    assert losses_of(varied[0][2]) == pytest.approx(losses_of(plain[0][2]), abs=tolerance)
    assert norms_of(varied[0][2]) == pytest.approx(norms_of(plain[0][2]), rel=5e-2 if variant == "bf16" else 1e-4)
    assert varied[0][1] == pytest.approx(plain[0][1], abs=tolerance)
    if variant == "bf16":
        assert varied[0][1] != plain[0][1]  # it was really on
