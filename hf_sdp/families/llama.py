"""Llama (transformers/models/llama/modeling_llama.py)."""

from .base import Block, Family

LLAMA = Family(
    layers="layers",
    blocks=(
        Block(kind="attention", norm="input_layernorm", module="self_attn"),
        Block(kind="mlp", norm="post_attention_layernorm", module="mlp"),
    ),
)
