"""All virtual workers at once: the same losses and gradients as one after the other, of every level and masking."""

import copy

import pytest
import torch

from hf_sdp import SDPConfig, make_plan, patch_model
from hf_sdp.model.stacked import can_be_stacked, stack
from tests.support.models import batch, tiny_model

N = 4
OPTIONS = [
    dict(level=level, masking=masking, coverage=coverage, depth_profile=profile)
    for level in ("neuron", "block")
    for masking in ("forward", "backward")
    for coverage, profile in ((0.5, "uniform"), (0.75, "uniform"), (0.5, "linear"))
]


def model() -> torch.nn.Module:
    return tiny_model(num_hidden_layers=4, attention_bias=True, mlp_bias=True, use_cache=False)


def one_by_one(options: dict, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    simulated = patch_model(model(), SDPConfig(simulate=N, **options)).train()
    losses = []
    for of_worker in batches:
        loss = simulated(**of_worker).loss / N
        loss.backward()  # the next forward is the next worker's
        losses.append(loss.item())
    return sum(losses), {name: p.grad for name, p in simulated.named_parameters()}


def at_once(stacked: torch.nn.Module, batches: list[dict]) -> tuple[float, dict[str, torch.Tensor]]:
    loss = stacked.train()(**{name: torch.cat([b[name] for b in batches]) for name in batches[0]}).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in stacked.named_parameters()}


def assert_equal(found, expected) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: name + m)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_all_at_once_is_one_by_one(options):
    stacked, batches = model(), [batch(k) for k in range(N)]
    plan = make_plan(model(), SDPConfig(**options), N)
    assert can_be_stacked(stacked, plan)
    stack(stacked, plan)
    assert_equal(at_once(stacked, batches), one_by_one(options, batches))


def test_another_plan_takes_the_place_of_the_first_and_of_the_full_model():
    stacked, batches = model(), [batch(k) for k in range(N)]
    dense = at_once(copy.deepcopy(stacked), batches)
    for options in (OPTIONS[0], dict(level="block"), dict(masking="backward"), OPTIONS[0]):
        stack(stacked, make_plan(model(), SDPConfig(**options), N))
        stacked.zero_grad()
        assert_equal(at_once(stacked, batches), one_by_one(options, batches))
    stack(stacked, make_plan(model(), SDPConfig(coverage=1.0), N))
    stacked.zero_grad()
    assert_equal(at_once(stacked, batches), dense)


@pytest.mark.parametrize("options", [dict(), dict(level="block"), dict(masking="backward")], ids=str)
def test_evaluation_is_that_of_the_full_model(options):
    dense, stacked = model().eval(), model()
    stack(stacked, make_plan(model(), SDPConfig(**options), N))
    with torch.no_grad():
        assert torch.equal(stacked.eval()(**batch(0)).logits, dense(**batch(0)).logits)


def test_what_cannot_be_stacked():
    qwen = tiny_model(model_type="qwen3")
    assert not can_be_stacked(qwen, make_plan(qwen, SDPConfig(), N))
    unequal = SDPConfig(coverage=[0.75, 0.5, 0.5, 0.25])
    assert not can_be_stacked(model(), make_plan(model(), unequal, N))
