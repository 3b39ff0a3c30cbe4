"""Frozen parameters are not learned, and nobody waits for ever."""

import pytest
import torch
import torch.distributed as dist

from hf_sdp import SDPAccelerator, SDPConfig, consolidate, patch_model
from tests.support.models import batch, tiny_model
from tests.support.oracle import compare
from tests.support.workers import run_workers

FROZEN = {
    "embeddings": ("model.embed_tokens",),
    "lower layers": ("model.embed_tokens", "model.layers.0.", "model.layers.1."),
    "all but the head": ("model.",),
    "one projection": ("model.layers.2.mlp.up_proj",),
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("config", [dict(level="block"), dict(level="neuron", coverage=0.75)], ids=str)
def test_workers_with_frozen_parameters_equal_the_oracle(config, frozen):
    compare(config, steps=3, frozen=frozen)


def train_on_embeddings(config: dict):
    accelerator = SDPAccelerator()
    model = patch_model(tiny_model(), SDPConfig(**config))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.2))
    ids = batch(dist.get_rank())["input_ids"]
    for _ in range(2):
        inputs = torch.nn.functional.one_hot(ids % 32, 32).float()
        accelerator.backward(model(inputs_embeds=inputs, labels=ids).loss)
        assert inputs.grad is None and not inputs.requires_grad  # the user's tensor stays as it is
        optimizer.step()
        optimizer.zero_grad()
    return consolidate(model)


@pytest.mark.parametrize("config", [dict(level="block"), dict(level="neuron", coverage=0.75)], ids=str)
def test_inputs_that_need_no_gradient(config):
    weights = run_workers(train_on_embeddings, config, timeout_s=60)[0]
    start = tiny_model().state_dict()
    assert torch.equal(weights["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert not torch.equal(weights["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"])
