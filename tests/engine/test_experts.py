"""Experts of which a worker holds some: what the router sends elsewhere, and experts that get nothing."""

import pytest
import torch
import torch.distributed as dist

import hf_sdp
from hf_sdp import SDPAccelerator, SDPConfig, consolidate, patch_model
from hf_sdp.model.experts import routed
from tests.support.models import batch_for, tiny_model
from tests.support.types import MODELS
from tests.support.workers import run_workers


def test_what_is_not_held_is_the_number_after_the_last_one_and_weighs_nothing():
    index, weights = torch.tensor([[0, 3], [2, 1]]), torch.tensor([[0.7, 0.3], [0.6, 0.4]])
    index, weights = routed([3, 1], 4, index, weights)
    assert index.tolist() == [[2, 0], [2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.3], [0.0, 0.4]]))


def train_with_a_router_that_knows_two_experts(sdp: dict):
    """All tokens go to two of four experts."""
    options = MODELS["mixtral"]
    model = tiny_model(**options)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gate.weight"):
                p.zero_()
    accelerator = SDPAccelerator(cpu=True)
    model = patch_model(model, SDPConfig(**sdp))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    after_first = None
    for step in range(2):
        accelerator.backward(model(**batch_for(model, 10 * step + dist.get_rank(), options["task"])).loss)
        optimizer.step()
        optimizer.zero_grad()
        full = consolidate(model)
        if full is not None and after_first is None:
            after_first = next(value for name, value in full.items() if name.endswith("experts.down_proj")).clone()
    hf_sdp.verify(model)
    return after_first


@pytest.mark.parametrize("sdp", [dict(coverage=0.25), dict(coverage=0.75)], ids=str)
def test_experts_without_tokens_stall_nobody_and_stay_as_they_were(sdp):
    after = run_workers(train_with_a_router_that_knows_two_experts, sdp)[0]
    before = next(p for n, p in tiny_model(**MODELS["mixtral"]).named_parameters() if n.endswith("experts.down_proj"))
    assert [torch.equal(*pair) for pair in zip(after, before, strict=True)].count(False) == 2
