"""Model types of all structures, by the options of ``tests.support.models.tiny_model``.

Parallel branches, norms on both sides of a block, fused projections, experts, latent attention; encoders alone, and
encoders with decoders, whose embeddings are one tensor of four names.
"""

from collections.abc import Iterable

import pytest

_CAUSAL = (
    "mistral", "qwen2", "gemma2", "gemma3_text", "phi3", "gpt_neox", "olmo2", "gpt2", "opt", "falcon", "mixtral",
    "qwen3_moe", "deepseek_v3",
)  # fmt: skip
MODELS = {
    **{model_type: dict(task="causal", model_type=model_type) for model_type in _CAUSAL},
    "mixtral, auxiliary loss": dict(
        task="causal", model_type="mixtral", output_router_logits=True, router_aux_loss_coef=0.5
    ),
    **{model_type: dict(task="masked", model_type=model_type) for model_type in ("bert", "modernbert")},
    "t5": dict(task="sequence to sequence", model_type="t5", decoder_start_token_id=0),
    "bart": dict(task="sequence to sequence", model_type="bart"),
    "whisper": dict(task="speech", model_type="whisper"),
}
BLOCK, NEURON = dict(level="block", coverage=0.5), dict(level="neuron", coverage=0.75)


def short(*names: str, more: Iterable[str] = ()) -> list:
    """All types; those of other names are long. ``more``: names that are not."""
    return [*(pytest.param(name, marks=() if name in names else pytest.mark.long) for name in MODELS), *more]
