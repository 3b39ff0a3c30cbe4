"""Tiny models and data, the same in every process."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sdp.bench.small_llama import small_llama

VOCAB = 64  # of small_llama
SMALL = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_attention_heads=8, use_cache=False)
"""Sizes for ``tiny_config`` whose memory is more than what an allocator rounds up."""


def tiny_config(**overrides) -> LlamaConfig:
    return small_llama(**{**dict(num_key_value_heads=4, max_position_embeddings=64, use_cache=True), **overrides})


def tiny_model(seed: int = 0, **overrides) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(tiny_config(**overrides))
    with torch.no_grad():  # norms and biases that are not all alike, so that a mix-up shows
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape))
    return model


def batch(index: int, size: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (size, length), generator=torch.Generator().manual_seed(1000 + index))
    return {"input_ids": ids, "labels": ids}
