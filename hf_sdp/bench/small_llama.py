"""The Llamas that tests and benchmarks train: one shape, and what differs from it."""

from transformers import LlamaConfig

_SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
    tie_word_embeddings=False, use_cache=False,
)  # fmt: skip


def small_llama(**sizes) -> LlamaConfig:
    """A Llama of 45 thousand parameters. ``sizes``: fields of LlamaConfig that are to be other ones.

    As many key/value heads as heads, unless ``num_key_value_heads`` is given. There is no cache: training has no use
    for one.
    """
    return LlamaConfig(**{**_SIZES, **sizes})
