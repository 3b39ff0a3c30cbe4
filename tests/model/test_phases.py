"""A schedule in one process: what a phase says of recomputation, copies, and what is refused before the training."""

import copy

import pytest
import torch
from torch import nn

from hf_sdp import SDPConfig, SDPConfigError, SDPStateError, follow_schedule, patch_model
from hf_sdp.checkpoint.marker import changes
from hf_sdp.model.state import get_state
from tests.support.models import batch, tiny_model

CHECKPOINTS_FIRST = ["0:0.5:gradient_checkpointing=true", "0.5:1"]


def simulated(schedule, model: nn.Module | None = None, **options):
    return patch_model(model or tiny_model(), SDPConfig(simulate=2, coverage_schedule=schedule, **options))


def recomputes(model) -> list:
    """The functions that recompute its layers."""
    return [m._gradient_checkpointing_func for m in model.modules() if vars(m).get("gradient_checkpointing")]


def test_the_first_phase_recomputes_its_layers_and_the_last_does_not():
    model = simulated(CHECKPOINTS_FIRST)
    assert len(recomputes(model)) >= model.config.num_hidden_layers
    follow_schedule(model, 1, 2)
    assert recomputes(model) == []
    follow_schedule(model, 0, 2)
    assert recomputes(model)


@pytest.mark.parametrize("before", [True, False])
def test_checkpointing_that_the_user_switched_on_stays(before):
    model = tiny_model()
    if before:
        model.gradient_checkpointing_enable()
    model = simulated(CHECKPOINTS_FIRST, model)
    if not before:
        model.gradient_checkpointing_enable()
    users = recomputes(model)
    follow_schedule(model, 1, 2)
    assert recomputes(model) == users != []


@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_a_copy_has_phases_of_its_own(masking):
    model = simulated(["0:0.5", f"0.5:0.5:level=block:masking={masking}"])
    classes = [type(module) for module in model.modules()]
    one, two = copy.deepcopy(model), copy.deepcopy(model)
    follow_schedule(one, 1, 2)
    assert [type(module) for module in model.modules()] == classes
    follow_schedule(two, 1, 2)
    follow_schedule(model, 1, 2)
    losses = [m(**batch(0)).loss for m in (one, two, model)]
    assert losses[0] == losses[1] == losses[2]


def test_gradients_of_another_plan_are_refused_in_a_simulation_too():
    model = simulated([(0.0, 0.5), (0.5, 1.0)])
    follow_schedule(model, 0, 2)
    model(**batch(0)).loss.backward()
    with pytest.raises(SDPStateError, match="has a gradient, which would be lost"):
        follow_schedule(model, 1, 2)


def test_a_loop_that_would_stay_in_the_first_phase_is_an_error_in_its_first_forward():
    model = simulated([(0.0, 0.5), (0.5, 1.0)])
    model.eval()(**batch(0))
    with torch.no_grad():
        model.train()(**batch(0))
    with pytest.raises(SDPStateError, match="LlamaForCausalLM has a coverage_schedule that nobody follows"):
        model(**batch(0))
    follow_schedule(model, 0, 2)
    model(**batch(0))


def test_splits_in_a_loop_of_ones_own_are_refused():
    model = simulated(["0:0.5", "0.5:1:splits=2"])
    with pytest.raises(SDPConfigError, match="splits of a phase is for the Trainer"):
        follow_schedule(model, 0, 2)


def norms_in_float32() -> nn.Module:
    model = tiny_model().bfloat16()
    for name, module in model.named_modules():
        if "norm" in name:
            module.float()
    return model


def synced_norms() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(tiny_model(task="image classification", model_type="resnet"))


BAD_LATER = {
    "dtypes in a block": (norms_in_float32, dict(coverage_schedule=["0:0.5", "0.5:0.5:level=block"]), "need one dtype"),
    "synced norms": (
        synced_norms,
        dict(masking="backward", coverage_schedule=["0:0.5", "0.5:0.5:masking=forward"]),
        "SyncBatchNorm",
    ),
    "recomputation in parts": (
        tiny_model,
        dict(reshard_after_forward=True, coverage_schedule=["0:0.5", "0.5:0.75:gradient_checkpointing=true"]),
        "would hang",
    ),
}


@pytest.mark.parametrize("case", BAD_LATER)
def test_what_is_wrong_with_a_later_phase_is_an_error_before_the_training(case):
    make, config, message = BAD_LATER[case]
    with pytest.raises(SDPConfigError, match=message):
        patch_model(make(), SDPConfig(**config), rank=0, world_size=4)


def test_four_bits_are_refused_in_a_later_phase_that_cuts_weights():
    pytest.importorskip("bitsandbytes")
    model = tiny_model(lora={}, quantized={}, hidden_size=64)
    with pytest.raises(SDPConfigError, match="four bits of a weight lie packed"):
        config = SDPConfig(level="block", coverage_schedule=["0:0.5", "0.5:0.5:level=neuron"])
        patch_model(model, config, rank=0, world_size=4)


def test_a_checkpoint_without_phases_is_told_from_a_run_with_them():
    """Also one of a version that had no schedules."""
    state = get_state(
        patch_model(tiny_model(), SDPConfig(coverage_schedule=[(0, 0.5), (0.5, 1)]), rank=0, world_size=4)
    )
    for config in ({"coverage": 0.5}, {"coverage": 0.5, "coverage_schedule": None}):
        saved = {"world_size": 4, "sdp_config": config, "versions": {}, "plan_hash": ""}
        (told,) = changes(saved, state, 4)
        assert told.startswith("coverage_schedule=None then, [{")
