"""Shares from the memory of each worker."""

import numpy as np
import pytest

from hf_sdp import SDPConfig, SDPConfigError, Workload, make_plan
from hf_sdp.estimate.capacity import GIB, STEPS
from hf_sdp.estimate.memory import sdp_step
from hf_sdp.families.meta_model import meta_model
from hf_sdp.plan.dealing import plan_of
from tests.support.models import tiny_config

WORKLOAD = Workload(batch=2, sequence=64)
MODEL = tiny_config(
    num_hidden_layers=8, hidden_size=64, num_attention_heads=8, num_key_value_heads=8, head_dim=8, intermediate_size=256
)


def needs(coverages, **options) -> np.ndarray:
    """Estimated peak of each worker, in bytes."""
    config = SDPConfig(coverage=list(coverages), **options)
    plan = plan_of(meta_model(MODEL), config, np.array(coverages))
    return np.array(
        [
            sdp_step(
                MODEL, plan, w, WORKLOAD, sharding=config.sharding, reshard_after_forward=config.reshard_after_forward
            ).memory.peak
            for w in range(len(coverages))
        ]
    )


def fitted(memory, **options):
    config = SDPConfig(memory_gib=[m / GIB for m in memory], workload=WORKLOAD, **options)
    plan = make_plan(MODEL, config, len(memory))
    return plan, [round(plan.coverage_of(w) * STEPS) / STEPS for w in range(len(memory))]


@pytest.mark.parametrize(
    "options",
    [pytest.param(dict(level="neuron"), marks=pytest.mark.long), dict(level="block", sharding="none")],
    ids=str,
)
def test_each_worker_gets_what_fits_and_no_step_more(options):
    asked = [1.0, 0.5, 0.5, 0.25]
    memory = needs(asked, **options) * 1.001
    plan, found = fitted(memory, **options)
    assert (needs(found, **options) <= memory).all()
    assert found[0] > found[1] == found[2] > found[3]
    for w in range(4):  # a step more of any class is too much for it
        more = [c + (memory[v] == memory[w]) / STEPS for v, c in enumerate(found)]
        assert max(more) > 1 or (needs(more, **options) > memory).any()


def test_enough_memory_is_plain_data_parallelism():
    plan, found = fitted([GIB] * 4)
    assert found == [1.0] * 4 and plan.is_full


def test_balanced_compute_gives_equal_shares_where_they_fit():
    memory = needs([0.5] * 4) * [2, 1.5, 1.001, 1.001]
    assert fitted(memory)[1][0] > 0.5
    assert fitted(memory, balance="compute")[1] == [0.5] * 4


def test_activations_count():
    memory = needs([0.5] * 4) * 1.001
    assert fitted(memory)[1] == [0.5] * 4
    more = SDPConfig(memory_gib=(memory / GIB).tolist(), workload=Workload(batch=3, sequence=64))
    assert make_plan(MODEL, more, 4).coverage < 0.5


@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_too_little_memory_is_an_error_that_says_by_how_much(factor):
    memory = needs([0.25] * 4) * factor
    with pytest.raises(
        SDPConfigError, match=r"is \S+ GiB too little: with coverage \[.*the workers need .*min_replication=2"
    ) as error:
        fitted(memory, min_replication=2)
    need = [float(n) for n in str(error.value).split("need [")[1].split("]")[0].split(", ")]
    missing = float(str(error.value).split(" is ")[1].split(" GiB")[0])
    assert missing == pytest.approx(sum(max(n - m / GIB, 0) for n, m in zip(need, memory, strict=True)), rel=0.02)


def test_one_capacity_for_each_subnetwork():
    with pytest.raises(SDPConfigError, match="memory_gib lists 2 subnetworks.*there are 4"):
        make_plan(MODEL, SDPConfig(memory_gib=[1, 1], workload=WORKLOAD), 4)
