"""Models like Llama: their blocks are found, and the gradients of a subnetwork are right at all levels."""

import pytest
from transformers import CONFIG_MAPPING

from hf_sdp import SDPConfig
from hf_sdp.bench.support.check import check
from hf_sdp.bench.support.tiny import tiny_config

LIKE_LLAMA = (
    "arcee", "cwm", "ernie4_5", "gemma", "granite", "helium", "internlm3", "jais2", "llama", "ministral3", "mistral",
    "nanochat", "olmo", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
SHORT = ("gemma", "granite", "llama", "qwen3", "starcoder2")
MODEL_TYPES = [
    pytest.param(name, marks=() if name in SHORT else pytest.mark.long)
    for name in LIKE_LLAMA
    if name in CONFIG_MAPPING  # older versions have fewer
]
LEVELS = {
    "neuron": dict(level="neuron"),
    "several parts": dict(level="neuron", coverage=0.75),
    "block": dict(level="block"),
    "layer": dict(level="block", block_granularity="layer"),
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_equal_those_of_the_dense_model_with_what_is_not_held_zeroed(model_type, level):
    config = tiny_config(model_type, num_key_value_heads=4)
    plan = check(config, "causal", SDPConfig(**LEVELS[level]), world=4, ranks=(0, 3))
    kinds = {module.kind for module in plan.modules}
    assert kinds == ({"layer"} if level == "layer" else {"attention", "mlp"})
    assert all(plan.numel(rank) < plan.full_numel for rank in (0, 3))
