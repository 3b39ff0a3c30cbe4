"""Models whose layers are those of Llama: a norm before attention, a norm before the MLP, two residual branches.

Granite multiplies both branches by a number. Source: the decoder layers in transformers/models/*/modeling_*.py, which
tests/model/test_families.py compares with Llama's.
"""

from .base import Block, Family, Stack
from .kinds import ATTENTION, MLP

PRE_NORM = Family(
    stacks=(
        Stack(
            layers="layers",
            blocks=(
                Block(kind=ATTENTION, norm="input_layernorm", module="self_attn"),
                Block(kind=MLP, norm="post_attention_layernorm", module="mlp"),
            ),
        ),
    ),
)
MODEL_TYPES = (
    "arcee", "cwm", "ernie4_5", "gemma", "granite", "helium", "internlm3", "jais2", "llama", "ministral3", "mistral",
    "nanochat", "olmo", "qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
"""``model_type`` of their configs."""
