"""Weights of a standard checkpoint in a model that is prepared already."""

import torch

from hf_sdp import SDPConfigError, consolidate
from hf_sdp.checkpoint.load import load_weights
from tests.support.models import batch, tiny_model
from tests.support.training import prepared
from tests.support.workers import run_workers


def load_other(folder):
    accelerator, model, optimizer = prepared(dict(level="block"))
    model.eval()
    model(**batch(0))  # something is gathered, and an evaluation copy exists
    load_weights(model, folder)
    weights = consolidate(model)
    logits = model(**batch(0)).logits.detach()
    try:
        load_weights(model, f"{folder}/missing")
    except SDPConfigError as error:
        return weights, logits, str(error)


def test_loading_reads_a_standard_checkpoint_bit_for_bit(tmp_path):
    other = tiny_model(seed=7).eval()
    other.save_pretrained(tmp_path, max_shard_size="50KB")
    results = run_workers(load_other, tmp_path)
    assert all(torch.equal(results[0][0][n], t) for n, t in other.state_dict().items())
    for _, logits, error in results:
        torch.testing.assert_close(logits, other(**batch(0)).logits, rtol=0, atol=1e-5)
        assert "neither model.safetensors nor" in error
