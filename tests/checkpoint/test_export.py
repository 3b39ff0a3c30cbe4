"""One subnetwork as a model of its own."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_sdp
from hf_sdp import SDPAccelerator, SDPConfig, SDPConfigError
from tests.support.models import batch, tiny_model
from tests.support.training import EVERYTHING
from tests.support.workers import run_workers


def export(folder, config, options):
    accelerator = SDPAccelerator()
    model = accelerator.prepare(hf_sdp.patch_model(tiny_model(seed=5, **options), SDPConfig(**config)))
    if "coverage_schedule" in config:
        assert accelerator.follow_schedule(1, 2)
    for subnetwork in range(4):
        hf_sdp.export_subnetwork(model, f"{folder}/{subnetwork}", subnetwork)
    return model(**batch(0)).logits.detach()


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (dict(coverage=0.5), EVERYTHING),
        (dict(coverage=0.75, sharding="none"), dict(EVERYTHING, hidden_size=48, tie_word_embeddings=False)),
        (dict(level="block", block_granularity="layer"), EVERYTHING),
        (dict(coverage_schedule=["0:0.5:masking=backward", "0.5:0.5"]), EVERYTHING),  # in the second phase
    ],
    ids=str,
)
def test_an_exported_subnetwork_computes_what_its_worker_computes(tmp_path, config, options):
    results = run_workers(export, tmp_path, config, options)
    for subnetwork, logits in enumerate(results):
        small = AutoModelForCausalLM.from_pretrained(tmp_path / str(subnetwork)).eval()
        torch.testing.assert_close(small(**batch(0)).logits, logits, rtol=0, atol=1e-5)
        assert small.num_parameters() < tiny_model(**options).num_parameters()


def refuse_export(folder, config):
    accelerator = SDPAccelerator()
    model = accelerator.prepare(hf_sdp.patch_model(tiny_model(), SDPConfig(**config)))
    with pytest.raises(SDPConfigError) as raised:
        hf_sdp.export_subnetwork(model, folder / "out")
    return str(raised.value)


def test_what_no_config_can_say_is_not_exported(tmp_path):
    for config, message in (
        (dict(level="block"), "no config says"),
        (dict(masking="backward"), "computes with the full model"),
        (dict(coverage=0.75), "not a multiple of the number of attention heads (3)"),
    ):
        assert all(message in e for e in run_workers(refuse_export, tmp_path, config))
    assert not (tmp_path / "out").exists()
