"""LoRA under the unmodified Trainer: against the simulation, resumed, and its adapters loaded by PEFT alone."""

import os

import pytest
import torch

from hf_sdp import SDPCallback, SDPConfig
from tests.support.runs import train_resume_and_reload
from tests.support.trainer import losses_of, make_trainer, norms_of, train
from tests.support.training import EVERYTHING
from tests.support.workers import run_workers

peft = pytest.importorskip("peft")


@pytest.mark.parametrize(
    "sdp",
    [
        dict(level="block"),
        dict(level="neuron", coverage_schedule=[(0.0, 1.0), (0.5, 0.5)]),  # saved at the boundary, and after it
        pytest.param(dict(level="block", coverage_schedule=[(0.0, 0.5), (0.5, 1.0)]), marks=pytest.mark.long),
        pytest.param(dict(level="neuron", coverage=0.5), marks=pytest.mark.long),
        pytest.param(dict(masking="backward"), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_run_equals_the_simulation_and_resumes_and_its_adapters_are_peft_s(tmp_path, sdp):
    (losses, norms, loss), simulated = train_resume_and_reload(tmp_path, sdp, {**EVERYTHING, "lora": {}})
    assert losses == pytest.approx(simulated[0], abs=1e-4)
    assert norms == pytest.approx(simulated[1], rel=1e-3)
    assert loss == pytest.approx(simulated[2], abs=1e-4)


@pytest.mark.parametrize("lora", [{}, pytest.param(dict(use_dora=True), marks=pytest.mark.long)], ids=str)
def test_full_coverage_equals_ddp(tmp_path, lora):
    arguments = dict(ddp_find_unused_parameters=False)
    ddp, sdp = (
        run_workers(train, tmp_path, sdp, arguments, {**EVERYTHING, "lora": lora}, world_size=2)[0]
        for sdp in (None, dict(coverage=1.0))
    )
    assert losses_of(sdp[2]) == pytest.approx(losses_of(ddp[2]), abs=1e-5)
    assert norms_of(sdp[2]) == pytest.approx(norms_of(ddp[2]), rel=1e-4)
    assert sdp[1] == pytest.approx(ddp[1], abs=1e-5)


def save_and_continue(folder, level: str):
    """Saved by rank 0 alone after the training, by all on request, and the best one loaded at the end."""
    arguments = dict(
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        learning_rate=1.0, max_steps=6, optim="sgd",
    )  # fmt: skip
    callback = SDPCallback(SDPConfig(level=level))
    trainer = make_trainer(folder, None, arguments, {**EVERYTHING, "lora": {}}, callbacks=[callback])
    trainer.train()
    best = min(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        trainer.save_model(folder / "alone")
    trainer.model.save_pretrained(folder / "together")
    return loss, best, sorted(os.listdir(folder / "alone")) if trainer.is_world_process_zero() else None


@pytest.mark.long
def test_adapters_are_saved_alone_and_together_and_the_best_are_loaded(tmp_path):
    (loss, best, files), _ = run_workers(save_and_continue, tmp_path, "block", world_size=2)
    assert loss == pytest.approx(best, abs=1e-6)
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(files)
    assert not any(name.startswith("model") for name in files)  # never the frozen base
    from safetensors.torch import load_file

    alone, together = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("alone", "together"))
    assert alone.keys() == together.keys() and all(torch.equal(alone[name], together[name]) for name in alone)
