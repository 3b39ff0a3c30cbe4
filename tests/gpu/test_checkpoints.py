"""Checkpoints of workers on CUDA: read by transformers on the CPU, by SDP, and to continue from."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_sdp
from hf_sdp import SDPConfig
from hf_sdp.engine.sharded import stored_tensors
from tests.support.models import batch, tiny_model
from tests.support.resume import train, weights_of
from tests.support.training import one_step, prepared
from tests.support.workers import run_workers

NEURON, BLOCK = dict(level="neuron", coverage=0.5), dict(level="block", coverage=0.5, sharding="none")
TWO_LAYERS = dict(num_hidden_layers=2)


def step_and_save(sdp: dict, folder) -> float:
    """Loss of the full model."""
    accelerator, model, optimizer = prepared(sdp, TWO_LAYERS)
    one_step(accelerator, model, optimizer)
    hf_sdp.save_pretrained(model, folder)
    inputs = {name: tensor.to(accelerator.device) for name, tensor in batch(9).items()}
    with torch.no_grad():
        return model.eval()(**inputs).loss.item()


@pytest.mark.parametrize("sdp", [NEURON, BLOCK], ids=str)
def test_plain_transformers_on_the_cpu_evaluates_as_the_workers_do(tmp_path, sdp):
    found = run_workers(step_and_save, sdp, tmp_path / "saved", device="cuda")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        expected = plain(**batch(9)).loss.item()
    before = tiny_model(**TWO_LAYERS).eval()(**batch(9)).loss.item()
    assert abs(before - expected) > 1e-3  # something was learned
    assert found == pytest.approx([expected] * 4, abs=1e-5)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    on_gpu = dict(use_cpu=False, adam_epsilon=1e-4)  # where gradients are near zero it would amplify rounding
    whole = run_workers(train, tmp_path / "whole", NEURON, on_gpu, None, TWO_LAYERS, device="cuda")
    checkpoint = (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "checkpoint-3")
    rest = run_workers(train, tmp_path / "parted", NEURON, on_gpu, str(checkpoint), TWO_LAYERS, device="cuda")
    for (losses, norms), (losses_of_rest, norms_of_rest) in zip(whole, rest, strict=True):
        assert losses_of_rest == pytest.approx(losses, abs=1e-4)
        assert norms_of_rest == pytest.approx(norms, rel=1e-4)
    resumed = weights_of(tmp_path / "parted" / "checkpoint-6")
    for name, expected in weights_of(tmp_path / "whole" / "checkpoint-6").items():
        torch.testing.assert_close(resumed[name], expected, rtol=0, atol=1e-4, msg=name)


def load(folder, sdp: dict) -> list[str]:
    """Names of full parameters of which this worker stores something."""
    full = load_file(folder / "model.safetensors")
    model = hf_sdp.from_pretrained(folder, SDPConfig(**sdp))
    found = []
    for region, tensor in stored_tensors(model):
        if region.numel:
            assert tensor.is_cuda
            assert torch.equal(tensor.cpu(), region.of(full[region.name])), region.name
            found.append(region.name)
    inputs = {name: tensor.to("cuda") for name, tensor in batch(9).items()}
    with torch.no_grad():
        assert model(**inputs).loss.item() == pytest.approx(_loss(folder), abs=1e-5)
    return found


def _loss(folder) -> float:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder).eval()(**batch(9)).loss.item()


@pytest.mark.parametrize("sdp", [NEURON, BLOCK], ids=str)
def test_each_worker_reads_its_slices_onto_the_gpu(tmp_path, sdp):
    model = tiny_model(**TWO_LAYERS)
    model.save_pretrained(tmp_path)
    found = run_workers(load, tmp_path, sdp, device="cuda")
    assert {name for names in found for name in names} == {name for name, _ in model.named_parameters()}
