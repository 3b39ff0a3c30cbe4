"""Model types of other structures than Llama's, with real workers: training, evaluation, the checkpoint."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sdp
from hf_sdp import SDPAccelerator, SDPConfig, patch_model
from tests.support.models import batch, tiny_model
from tests.support.oracle import compare
from tests.support.workers import run_workers

CASES = {
    "biases of the heads": ("qwen2", dict(level="neuron", coverage=0.75)),
    "norms of a head, held by all": ("qwen3", dict(level="neuron", coverage=0.75)),
    "norms of a head, one part": ("qwen3", dict(level="neuron", coverage=0.5, sharding="none")),
    "norms of a head, backward": ("qwen3", dict(level="neuron", masking="backward")),
    "tied embeddings, norms plus one": ("gemma", dict(level="block", coverage=0.5)),
    "layer norms with biases": ("starcoder2", dict(level="neuron", coverage=0.75)),
    "layers": ("mistral", dict(level="block", block_granularity="layer")),
}


SHORT = ("norms of a head, held by all", "tied embeddings, norms plus one", "layer norms with biases")
PARAMS = [pytest.param(case, marks=() if case in SHORT else pytest.mark.long) for case in CASES]


@pytest.mark.parametrize("case", PARAMS)
def test_workers_equal_the_oracle(case):
    model_type, config = CASES[case]
    compare(config, dict(model_type=model_type, num_attention_heads=8), optimizer="sgd", accumulation=2, steps=4)


def evaluate_and_reload(model_type: str, sdp: dict, folder):
    accelerator = SDPAccelerator(cpu=True)
    model = patch_model(tiny_model(model_type=model_type, num_attention_heads=8), SDPConfig(**sdp))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(**batch(accelerator.process_index)).loss)
    optimizer.step()
    hf_sdp.verify(model)
    hf_sdp.save_pretrained(model, folder)
    with torch.no_grad():
        found = model.eval()(**batch(9)).logits  # comes after rank 0 has written
        plain = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.equal(found, plain(**batch(9)).logits)
    again = hf_sdp.from_pretrained(folder, SDPConfig(**sdp)).eval()
    with torch.no_grad():
        assert torch.equal(again(**batch(9)).logits, found)


@pytest.mark.parametrize("case", PARAMS)
def test_evaluation_is_that_of_the_saved_model(tmp_path, case):
    run_workers(evaluate_and_reload, *CASES[case], tmp_path / "saved")
