"""What every worker stores, to the byte."""

import pytest
import torch.distributed as dist

from hf_sdp import SDPConfig, make_plan
from hf_sdp.engine.metrics import state_bytes
from hf_sdp.engine.sharded import find_sharded
from hf_sdp.model.state import local_tensor
from tests.support.models import batch, tiny_config
from tests.support.training import prepared
from tests.support.workers import run_workers


def measure_state(config, model_options):
    accelerator, model, optimizer = prepared(config, model_options)
    accelerator.backward(model(**batch(dist.get_rank())).loss)
    gradients = state_bytes(model, None)["gradients"]
    optimizer.step()
    measured = {**state_bytes(model, optimizer), "gradients": gradients}
    padded = sum(local_tensor(p.detach()).untyped_storage().nbytes() for p in find_sharded(model).parameters.values())
    return measured, padded


@pytest.mark.parametrize("level", ["neuron", "block"])
@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_full_sharding_stores_one_world_th_to_the_byte(level, masking):
    full = make_plan(tiny_config(), SDPConfig(level=level), 4).full_numel * 4
    for measured, padded in run_workers(measure_state, dict(level=level, masking=masking), {}):
        assert measured == {"parameters": full // 4, "gradients": full // 4, "optimizer": 2 * full // 4}
        assert padded == full // 4


def test_uneven_shards_store_everything_once_and_pad_at_most_a_row_each():
    odd = dict(hidden_size=20, intermediate_size=33, num_attention_heads=5, num_key_value_heads=5, vocab_size=67)
    plan = make_plan(tiny_config(**odd), SDPConfig(coverage=2 / 3), 3)
    results = run_workers(measure_state, dict(coverage=2 / 3), odd, world_size=3)
    assert sum(m["parameters"] for m, _ in results) == plan.full_numel * 4
    rows = sum(plan.shapes[n][-1] if len(plan.shapes[n]) > 1 else 1 for p in plan.held_parts(0) for n in p.regions)
    rows += sum(
        plan.shapes[n][-1] if len(plan.shapes[n]) > 1 else 1 for n, s in plan.slices.items() if s[0].unit is None
    )
    assert all(m["parameters"] <= padded <= m["parameters"] + rows * 4 for m, padded in results)


@pytest.mark.parametrize("level", ["neuron", "block"])
def test_without_sharding_a_worker_stores_what_the_plan_says_to_the_byte(level):
    plan = make_plan(tiny_config(), SDPConfig(level=level, coverage=0.75), 4)
    results = run_workers(measure_state, dict(level=level, coverage=0.75, sharding="none"), {})
    for rank, (measured, _) in enumerate(results):
        held = plan.numel(rank) * 4
        assert measured == {"parameters": held, "gradients": held, "optimizer": 2 * held}
