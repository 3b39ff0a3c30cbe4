"""Models of other families: their blocks are found, and the gradients of a subnetwork are right."""

import pytest
import torch
from transformers import CONFIG_MAPPING

from hf_sdp import SDPConfig, make_plan, patch_model
from hf_sdp.model.state import get_state
from tests.support.models import batch, tiny_config, tiny_model

LIKE_LLAMA = (
    "arcee", "cwm", "ernie4_5", "gemma", "granite", "helium", "internlm3", "jais2", "llama", "ministral3", "mistral",
    "nanochat", "olmo", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
MODEL_TYPES = [name for name in LIKE_LLAMA if name in CONFIG_MAPPING]  # older versions have fewer
SIZES = dict(num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
LEVELS = {
    "neuron": dict(level="neuron"),
    "several parts": dict(level="neuron", coverage=0.75),
    "block": dict(level="block"),
    "layer": dict(level="block", block_granularity="layer"),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_equal_those_of_the_dense_model_with_what_is_not_held_zeroed(model_type, level):
    config = SDPConfig(**LEVELS[level])
    plan = make_plan(tiny_config(model_type, **SIZES), config, 4)
    kinds = {module.kind for module in plan.modules}
    assert kinds == ({"layer"} if level == "layer" else {"attention", "mlp"})
    for rank in (0, 3):
        dense = tiny_model(model_type=model_type, **SIZES)
        with torch.no_grad():
            for name, slices in plan.slices.items():
                for s in slices:
                    if rank not in s.holders:
                        dense.get_parameter(name).narrow(s.dim, s.start, s.stop - s.start).zero_()
        expected = dense(**batch(3), use_cache=False)
        expected.loss.backward()
        model = patch_model(tiny_model(model_type=model_type, **SIZES), config, rank=rank, world_size=4)
        found = model(**batch(3))
        found.loss.backward()
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
        assert sum(p.numel() for p in model.parameters()) == plan.numel(rank) < plan.full_numel
        for local_name, p in model.named_parameters():
            region = get_state(model).held.subnetwork.tensors[local_name].region
            torch.testing.assert_close(
                p.grad, region.of(dense.get_parameter(region.name).grad), rtol=1e-4, atol=1e-6, msg=local_name
            )
