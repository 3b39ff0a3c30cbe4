"""Tiny models and data, the same in every process."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 64


def tiny_config(**overrides) -> LlamaConfig:
    settings = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaConfig(**{**settings, **overrides})


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
