"""Frozen parameters are not learned, and nobody waits for ever."""

import pytest
import torch
import torch.distributed as dist

from hf_sdp import SDPAccelerator, SDPConfig, consolidate, patch_model
from hf_sdp.bench.fake_world import fake_world, measure_steps, parallelize
from hf_sdp.engine.sharded import find_sharded
from hf_sdp.model.state import local_tensor
from tests.support.models import batch, tiny_model
from tests.support.oracle import compare, freeze
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


def test_frozen_parameters_are_stored_but_not_reduced_and_have_no_state():
    """On one worker of four, without the others: bytes of what it stores and sends."""
    found = []
    for frozen in ((), FROZEN["lower layers"]):
        with fake_world(4):
            model, optimizer = parallelize(freeze(tiny_model(), frozen), SDPConfig(), torch.device("cpu"))
            learned = sum(
                local_tensor(p.detach()).nbytes for p in find_sharded(model).parameters.values() if p.requires_grad
            )
            (step,) = measure_steps(model, optimizer, [(2, 16)], torch.device("cpu"))
        assert (step["gradients"], step["optimizer"]) == (learned, 2 * learned)
        found.append(step)
    full, frozen = found
    assert frozen["parameters"] == full["parameters"]
    assert full["bytes_sent"] / 2 < frozen["bytes_sent"] < full["bytes_sent"]  # all is gathered, some is reduced


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
