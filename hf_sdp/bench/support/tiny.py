"""Tiny configs of all model types: the sizes that their configs have under whatever name, made small."""

import copy
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

WIDTH, HEADS, HEAD_DIM, LAYERS, VOCAB, LENGTH = 64, 8, 8, 4, 128, 16

_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "encoder_hidden_size"), WIDTH),
    **dict.fromkeys(("embedding_size", "lru_width", "projection_dim", "model_dim", "attention_hidden_size"), WIDTH),
    **dict.fromkeys(
        ("intermediate_size", "d_ff", "n_inner", "ffn_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 2 * WIDTH
    ),
    **dict.fromkeys(("ffn_hidden_size", "dim_ff", "dff", "hidden_dim", "ffn_intermediate_size"), 2 * WIDTH),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_intermediate_size"), 2 * WIDTH),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_dim", "expert_intermediate_size"), WIDTH // 2),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), LAYERS
    ),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), HEADS),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_kv_heads", "multi_query_group_num"), HEADS // 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size", "dim_head", "kv_channels", "v_head_dim"), HEAD_DIM),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), HEAD_DIM),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 2 * HEAD_DIM),
    **dict.fromkeys(("vocab_size", "decoder_vocab_size"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_target_positions"), 64),
    "max_source_positions": LENGTH,
    "type_vocab_size": 2,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "index_topk": 8,
    "index_n_heads": 4,
    "index_head_dim": 16,
}
_OFF = ("dropout", "drop", "layerdrop", "jitter_noise")
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id")


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a model type, with tiny sizes and without dropout. ``overrides``: of the sizes of its text model.

    Raises: whatever the class of the config says to such sizes.
    """
    cls = CONFIG_MAPPING[model_type]
    special = SPECIAL.get(model_type, {})
    try:
        default = cls()
    except Exception:  # it needs some of the sizes
        default = None
    values = _values(default, overrides) if default is not None else dict(_SIZES, **overrides)
    return cls(**{**values, **special})


def _values(config: PreTrainedConfig, overrides: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    given = config.to_dict()
    for name in {*given, *getattr(config, "attribute_map", {})}:
        if name in overrides:
            values[name] = overrides[name]
            continue
        if name in getattr(config, "attribute_map", {}) and config.attribute_map[name] in given:
            continue
        value = given.get(name)
        if name in _SIZES and not isinstance(value, (list, dict, bool)):
            values[name] = _SIZES[name]
        elif isinstance(value, float) and (any(part in _OFF for part in name.split("_")) or "pdrop" in name):
            values[name] = 0.0
        elif name in _TOKENS and isinstance(value, int):
            values[name] = 1
    sub_configs = getattr(config, "sub_configs", {})
    for name in sub_configs:
        sub = getattr(config, name, None)
        if isinstance(sub, PreTrainedConfig):
            values[name] = {**_values(sub, overrides), "model_type": sub.model_type}
    layers = overrides.get("num_hidden_layers", LAYERS)
    for name in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types"):
        types = given.get(name)
        if isinstance(types, (list, tuple)) and len(types) != layers and name not in values:
            values[name] = _of_every_kind(list(types), layers)
    return values


def _of_every_kind(types: list, layers: int) -> list:
    kinds = list(dict.fromkeys(types))
    return [kinds[i % len(kinds)] for i in range(layers)]


SPECIAL: dict[str, dict[str, Any]] = {}
"""What a model type needs besides."""

TASKS = {
    "causal": (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, "AutoModelForCausalLM"),
    "masked": (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, "AutoModelForMaskedLM"),
    "sequence to sequence": (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, "AutoModelForSeq2SeqLM"),
    "speech": (modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, "AutoModelForSpeechSeq2Seq"),
}
"""Task -> model types, name of the class that makes their models."""


def tiny_model(config: PreTrainedConfig, task: str, seed: int = 0) -> PreTrainedModel:
    """A model of a tiny config, in float32, in which no two parameters are alike."""
    torch.manual_seed(seed)
    model = getattr(transformers, TASKS[task][1]).from_config(copy.deepcopy(config)).float().train()
    with torch.no_grad():
        for p in model.parameters():
            if not torch.isfinite(p).all():
                p.normal_(0, 0.02)
            p.add_(0.02 * torch.randn(p.shape))
    return model


def tiny_batch(model: PreTrainedModel, index: int = 0, size: int = 2) -> dict[str, torch.Tensor]:
    """Random tokens (or features) with their labels."""
    generator = torch.Generator().manual_seed(1000 + index)
    ids = torch.randint(3, VOCAB, (size, LENGTH), generator=generator)
    main = getattr(model, "main_input_name", "input_ids")
    if main == "input_features":
        bins, frames = model.config.num_mel_bins, 2 * model.config.max_source_positions
        return {main: torch.randn(size, bins, frames, generator=generator), "labels": ids}
    return {"input_ids": ids, "labels": ids.clone()}
