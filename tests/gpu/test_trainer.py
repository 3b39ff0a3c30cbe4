"""The Trainer on CUDA over NCCL, and mixed precision."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sdp
from hf_sdp.engine.sharded import get_sharded
from tests.support.models import batch
from tests.support.trainer import Rows, losses_of, make_trainer
from tests.support.training import prepared
from tests.support.workers import run_workers

NEURON, TWO_LAYERS = dict(level="neuron", coverage=0.5), dict(num_hidden_layers=2)
RUN = dict(use_cpu=False, max_steps=6, save_strategy="steps", save_steps=6)


def train(folder, arguments: dict):
    hf_sdp.enable()
    trainer = make_trainer(folder, NEURON, {**RUN, **arguments}, TWO_LAYERS)
    assert trainer.args.device.type == "cuda"
    trainer.train()
    return losses_of(trainer.state.log_history), trainer.evaluate()["eval_loss"]


@pytest.mark.parametrize(("arguments", "tolerance"), [({}, 1e-5), (dict(bf16=True), 1e-2)], ids=["fp32", "bf16"])
def test_its_evaluation_is_that_of_the_reloaded_checkpoint(tmp_path, arguments, tolerance):
    results = run_workers(train, tmp_path, arguments, device="cuda")
    losses, found = results[0]
    assert results == [results[0]] * 4 and len(losses) == 6 and losses[-1] < losses[0]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-6").eval()
    ids = Rows(24, seed=1).ids
    with torch.no_grad():
        assert found == pytest.approx(plain(input_ids=ids, labels=ids).loss.item(), abs=tolerance)


def first_step(param_dtype: str | None):
    accelerator, model, optimizer = prepared({**NEURON, "param_dtype": param_dtype}, TWO_LAYERS)
    inputs = {name: tensor.to(accelerator.device) for name, tensor in batch(accelerator.process_index).items()}
    loss = model(**inputs).loss
    accelerator.backward(loss)
    optimizer.step()
    parameters = get_sharded(model, "The test").parameters.values()
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in parameters)
    return loss.item()


def test_computing_in_bfloat16_keeps_parameters_in_float32():
    exact = run_workers(first_step, None, device="cuda")
    rounded = run_workers(first_step, "bfloat16", device="cuda")
    assert all(map(math.isfinite, rounded)) and rounded != exact
    assert rounded == pytest.approx(exact, rel=2e-2)
