"""Running statistics of batch norms: those of a subnetwork's own batches, and of the full model."""

import copy

import pytest
import torch
from torch import nn

import hf_sdp
from hf_sdp import SDPConfig, SDPConfigError, make_plan, patch_model
from hf_sdp.bench.support.models import tiny_batch, tiny_model
from hf_sdp.bench.support.tiny import tiny_config
from hf_sdp.model.statistics import batch_norms, holders_of

TASK = "image classification"
LEVELS = {
    "block": dict(level="block"),
    "layer": dict(level="block", block_granularity="layer"),
    "neuron": dict(level="neuron"),
    "several parts": dict(level="neuron", coverage=0.75),
}
WORKERS = 4


def resnet(**overrides):
    return tiny_model(tiny_config("resnet", **overrides), TASK)


def batch(model, index: int) -> dict[str, torch.Tensor]:
    return tiny_batch(model, index, task=TASK)


def statistics(model) -> dict[str, torch.Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_a_simulation_has_the_mean_over_the_holders(level, masking):
    sdp = dict(LEVELS[level], masking=masking)
    plan = make_plan(resnet(), SDPConfig(**sdp), WORKERS)
    simulated = patch_model(resnet(), SDPConfig(**sdp, simulate=WORKERS))
    of_workers = []
    for worker in range(WORKERS):
        model = patch_model(resnet(), SDPConfig(**sdp), rank=worker, world_size=WORKERS)
        for index in (worker, worker + WORKERS):
            model(**batch(model, index)).loss.backward()
        of_workers.append(statistics(model))
    for index in range(2 * WORKERS):
        simulated(**batch(simulated, index)).loss.backward()
    found, before, shared = statistics(simulated), statistics(resnet()), 0
    for name, norm in batch_norms(simulated).items():
        holders = holders_of(plan, name, norm.num_features)
        shared += bool(holders.all())
        for own in ("running_mean", "running_var"):
            each = torch.stack([of_worker[f"{name}.{own}"] for of_worker in of_workers])
            assert torch.equal((each != before[f"{name}.{own}"]).any(1), holders.any(1))
            torch.testing.assert_close(found[f"{name}.{own}"], (each * holders).sum(0) / holders.sum(0))
    assert (shared < len(batch_norms(simulated))) == (masking == "forward")


def test_a_simulation_has_those_of_the_first_worker_where_that_is_asked_for():
    sdp = dict(LEVELS["neuron"])
    plan = make_plan(resnet(), SDPConfig(**sdp), WORKERS)
    first = patch_model(resnet(), SDPConfig(**sdp), rank=0, world_size=WORKERS)
    first(**batch(first, 0))
    mean, of_first = (
        patch_model(resnet(), SDPConfig(**sdp, simulate=WORKERS, average_shared_statistics=average))
        for average in (True, False)
    )
    for model in (mean, of_first):
        for index in range(WORKERS):
            model(**batch(model, index)).loss.backward()
    for name, expected in statistics(first).items():
        found, others = statistics(of_first)[name], statistics(mean)[name]
        if holders_of(plan, name.rpartition(".")[0], len(found)).all():
            torch.testing.assert_close(found, expected)
            assert not torch.allclose(others, expected)
        else:
            torch.testing.assert_close(found, others)


def test_what_is_loaded_into_a_simulation_is_where_it_goes_on():
    simulated = patch_model(resnet(), SDPConfig(level="block", simulate=2))
    simulated(**batch(simulated, 0))
    loaded = copy.deepcopy(resnet().state_dict())
    simulated.load_state_dict(loaded)
    simulated(**batch(simulated, 1))
    model = patch_model(resnet(), SDPConfig(level="block"), rank=1, world_size=2)
    model(**batch(model, 1))
    name = "resnet.embedder.embedder.normalization.running_mean"
    expected = (loaded[name] + statistics(model)[name]) / 2  # worker 0 has seen nothing since
    torch.testing.assert_close(statistics(simulated)[name], expected)


def test_recalibrated_statistics_are_those_of_the_full_model():
    simulated = patch_model(resnet(), SDPConfig(level="block", simulate=2))
    for index in range(4):
        simulated(**batch(simulated, index)).loss.backward()
    dense = resnet()
    for norm in batch_norms(dense).values():
        norm.momentum = None  # the mean over all batches
        norm.reset_running_stats()
    for index in range(10, 13):
        dense(**batch(dense, index))
    batches = [batch(simulated, index) for index in range(10, 14)]
    hf_sdp.recalibrate(simulated, batches, 3)
    assert simulated.training
    for name, expected in statistics(dense).items():
        torch.testing.assert_close(statistics(simulated)[name], expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(SDPConfigError, match="the dataloader has 4"):
        hf_sdp.recalibrate(simulated, batches, 5)
    torch.testing.assert_close(statistics(simulated), statistics(dense), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("sdp", "warns"),
    [(dict(), True), (dict(recalibrate_batches=2), False), (dict(masking="backward"), False)],
    ids=str,
)
def test_statistics_of_subnetworks_are_warned_of(sdp, warns, caplog):
    patch_model(resnet(), SDPConfig(level="block", simulate=2, **sdp))
    assert ("running statistics are those of subnetworks" in caplog.text) == warns


def test_a_model_without_batch_norms_has_nothing_to_recalibrate():
    model = patch_model(tiny_model(tiny_config("vit"), TASK), SDPConfig(simulate=2))
    with pytest.raises(SDPConfigError, match="no batch norms"):
        hf_sdp.recalibrate(model, [], 1)
    for options in (dict(recalibrate_batches=2), dict(average_shared_statistics=False)):
        with pytest.raises(SDPConfigError, match="has no effect: ViTForImageClassification has no batch norms"):
            patch_model(tiny_model(tiny_config("vit"), TASK), SDPConfig(simulate=2, **options))


def test_weights_of_another_dtype_than_the_statistics_are_refused():
    with pytest.raises(SDPConfigError, match="param_dtype='bfloat16': resnet.*a batch norm.*are float32"):
        patch_model(resnet(), SDPConfig(level="block", param_dtype="bfloat16"), rank=0, world_size=2)
    patch_model(resnet(), SDPConfig(level="block", param_dtype="float32"), rank=0, world_size=2)


def test_norms_that_communicate_in_their_forward_are_refused():
    model = nn.SyncBatchNorm.convert_sync_batchnorm(resnet())
    with pytest.raises(SDPConfigError, match="embedder.normalization is a SyncBatchNorm"):
        patch_model(model, SDPConfig(level="block"), rank=0, world_size=2)
    assert hf_sdp.model.state.find_state(model) is None
