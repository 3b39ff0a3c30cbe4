"""The full model from its shards, in the standard format."""

import torch
from transformers import AutoModelForCausalLM

import hf_sdp
from hf_sdp import SDPAccelerator, SDPConfig, consolidate
from tests.support.models import tiny_model
from tests.support.training import EVERYTHING
from tests.support.workers import run_workers


def save_in_shards(folder):
    model = SDPAccelerator().prepare(hf_sdp.patch_model(tiny_model(seed=3, **EVERYTHING), SDPConfig(coverage=0.75)))
    hf_sdp.save_pretrained(model, folder, max_shard_size="9KB")
    written = {}
    consolidate(model, written.__setitem__)
    return written


def test_large_models_are_saved_in_shards_with_an_index(tmp_path):
    written = run_workers(save_in_shards, tmp_path)
    assert (
        len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
        and (tmp_path / "model.safetensors.index.json").exists()
    )
    full, loaded = tiny_model(seed=3, **EVERYTHING), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, full.get_parameter(n)) for n, p in loaded.named_parameters())
    assert written[0].keys() == dict(full.named_parameters()).keys() and not any(written[1:])
