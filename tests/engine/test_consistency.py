"""All workers have rank 0's values, and differences between them are found."""

import pytest
import torch
import torch.distributed as dist

from hf_sdp import SDPAccelerator, SDPConfig, SDPStateError, consolidate, patch_model, verify
from hf_sdp.engine.sharded import find_sharded
from hf_sdp.model.state import get_state, local_tensor
from tests.support.models import tiny_model
from tests.support.training import prepared
from tests.support.workers import run_workers


def same_start(config):
    """Every worker makes another model; rank 0's values must be everybody's."""
    accelerator = SDPAccelerator()
    model = accelerator.prepare(patch_model(tiny_model(seed=dist.get_rank()), SDPConfig(**config)))
    verify(model)
    held = get_state(model).held
    assert sum(region.numel for regions in held.owners.values() for _, region in regions) == held.plan.full_numel
    weights, again = consolidate(model), accelerator.get_state_dict(model)
    if weights is not None:
        assert weights.keys() == again.keys() and all(torch.equal(weights[n], again[n]) for n in weights)
        assert all(t.device.type == "cpu" for t in weights.values())
    return weights


@pytest.mark.parametrize(
    "config", [dict(), dict(level="block", coverage=0.75), dict(masking="backward"), dict(sharding="none")], ids=str
)
def test_consolidated_values_are_those_of_rank_0_bit_for_bit(config):
    results = run_workers(same_start, config)
    assert [r is None for r in results] == [False, True, True, True]
    expected = tiny_model(seed=0).state_dict()
    assert results[0].keys() == expected.keys()
    assert all(torch.equal(results[0][n], t) for n, t in expected.items())


def resize():
    accelerator, model = SDPAccelerator(), patch_model(tiny_model(), SDPConfig(level="block"))
    model.resize_token_embeddings(80)
    with pytest.raises(SDPStateError, match=r"lm_head.weight has shape \(80, 32\), the plan says \(64, 32\)"):
        accelerator.prepare(model)


def test_a_model_that_was_resized_after_patching_is_refused():
    """Its checkpoint would have the old config and could not be loaded."""
    run_workers(resize)


def tamper(how: str):
    accelerator, model, _ = prepared(dict(sharding="none"))
    sharded = find_sharded(model)
    with torch.no_grad():
        if how == "replica" and dist.get_rank() == 2:
            local_tensor(sharded.parameters["model.norm.weight"].detach())[3] += 1e-7
        if how == "version" and dist.get_rank() == 2:
            sharded.run.version += 1
    try:
        verify(model)
    except SDPStateError as error:
        return str(error)


def test_verify_finds_the_first_difference_on_every_rank():
    for how, message in (
        ("replica", "model.norm.weight: replica differs"),
        ("version", "number of weight updates differs"),
    ):
        errors = run_workers(tamper, how)
        assert len(set(errors)) == 1 and message in errors[0]
    assert run_workers(tamper, "nothing") == [None] * 4
