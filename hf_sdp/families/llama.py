"""Llama (transformers/models/llama/modeling_llama.py)."""

from .base import Block, Family, Stack
from .kinds import ATTENTION, MLP

LLAMA = Family(
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
