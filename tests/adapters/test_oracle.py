"""LoRA adapters trained by several workers, against N virtual workers in one process."""

import pytest

from tests.support.oracle import compare
from tests.support.training import EVERYTHING

pytest.importorskip("peft")

LONG = pytest.mark.long
BLOCK, HALF, SEVERAL_PARTS = dict(level="block"), dict(coverage=0.5), dict(coverage=0.75)
BACKWARD = [dict(coverage=0.75, masking="backward"), dict(level="block", masking="backward")]


@pytest.mark.parametrize(
    "config", [BLOCK, SEVERAL_PARTS, *(pytest.param(config, marks=LONG) for config in (HALF, *BACKWARD))], ids=str
)
def test_adapters_equal_the_oracle(config):
    """Grouped queries, biases, tied embeddings; of four workers some have modules in several parts."""
    compare(config, {**EVERYTHING, "lora": {}}, steps=4, optimizer="adamw")


@pytest.mark.parametrize(
    "config", [SEVERAL_PARTS, *(pytest.param(config, marks=LONG) for config in (BLOCK, HALF, *BACKWARD))], ids=str
)
def test_magnitudes_equal_the_oracle(config):
    compare(config, {**EVERYTHING, "lora": dict(use_dora=True)}, steps=4)


OTHERS = {
    "layers that learn nothing": (BLOCK, dict(lora=dict(target_modules=["q_proj"], layers_to_transform=[1]))),
    "other modules that learn": (
        SEVERAL_PARTS,
        dict(attention_bias=True, lora=dict(modules_to_save=["embed_tokens", "lm_head"], bias="lora_only")),
    ),
    "embeddings": (BLOCK, dict(**EVERYTHING, lora=dict(target_modules=["embed_tokens", "q_proj"]))),
    "experts": (BLOCK, dict(task="causal", model_type="mixtral", lora={})),
    "fused and transposed": (
        SEVERAL_PARTS,
        dict(
            task="causal",
            model_type="gpt2",
            lora=dict(use_dora=True, fan_in_fan_out=True, target_modules=["c_attn", "c_proj", "c_fc"]),
        ),
    ),
}


@pytest.mark.long
@pytest.mark.parametrize("name", OTHERS)
def test_other_adapters_equal_the_oracle(name):
    config, model = OTHERS[name]
    compare(config, model, steps=3)
