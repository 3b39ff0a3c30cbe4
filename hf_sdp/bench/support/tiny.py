"""Tiny configs of all model types: the sizes that their configs have under whatever name, made small."""

import dataclasses
import inspect
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from .special import SPECIAL

WIDTH, HEADS, HEAD_DIM, LAYERS, VOCAB = 64, 8, 8, 4, 128
END, PADDING = 1, 0
"""Token ids."""

_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "encoder_hidden_size"), WIDTH),
    **dict.fromkeys(
        ("embedding_size", "lru_width", "projection_dim", "model_dim", "emb_dim", "attention_hidden_size"), WIDTH
    ),
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
    "max_source_positions": 32,
    "entity_vocab_size": VOCAB,
    "speech_encoder_layers": LAYERS,
    "speech_encoder_intermediate_size": 2 * WIDTH,
    "speech_encoder_attention_heads": HEADS,
    "expert_ffn_hidden_size": WIDTH // 2,
    "type_vocab_size": 2,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "num_kv_shared_layers": 2,
    "n_shared_experts": 1,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": HEAD_DIM,
    "linear_value_head_dim": HEAD_DIM,
    "linear_head_dim": HEAD_DIM,
    "mamba_d_state": 16,
    "mamba_d_ssm": 2 * WIDTH,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "state_size": 16,
    "zero_expert_num": 2,
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
    "first_k_dense_replace": 2,
    "num_mel_bins": 16,
    "num_filters": 4,
    "base_channels": 32,
    "index_topk": 8,
    "index_n_heads": 4,
    "index_head_dim": 16,
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "audio_hidden_size", "hidden_size_global"), WIDTH),
    "depth": 2,
}
_OFF = {"dropout", "drop", "layerdrop", "jitter"}
_TOKENS = {
    "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id", "cls_token_id", "forced_eos_token_id",
    "blank_token_id",
}  # fmt: skip
_LISTS = {"layer_types", "layers_block_type", "block_types", "mlp_layer_types"}
"""The kind of each layer."""


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The config of a model type, with tiny sizes and without dropout. ``overrides``: of the sizes of its text model.

    Raises: whatever the class of the config says to such sizes.
    """
    cls = CONFIG_MAPPING[model_type]
    try:
        default = cls()
    except Exception:  # it needs some of the sizes
        default = None
    values = dict(_SIZES) if default is None else _values(default)
    return cls(**_merged(values, SPECIAL.get(model_type, {}), overrides))


def _merged(*several: dict[str, Any]) -> dict[str, Any]:
    """The later ones over the earlier ones; what is a dict in both is merged as well."""
    result: dict[str, Any] = {}
    for values in several:
        for name, value in values.items():
            both = isinstance(value, dict) and isinstance(result.get(name), dict)
            result[name] = _merged(result[name], value) if both else value
    return result


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments for another config of its class."""
    values: dict[str, Any] = {}
    given = config.to_dict()
    for name in _arguments(type(config)) & given.keys():
        value = given[name]
        if name in _SIZES and not isinstance(value, (list, dict, bool)):
            values[name] = _SIZES[name]
        elif isinstance(value, float) and (_OFF & set(name.split("_")) or "pdrop" in name):
            values[name] = 0.0
        elif name == "pad_token_id":
            values[name] = PADDING  # heads that read the last token need it
        elif name in _TOKENS and isinstance(value, int):
            values[name] = END
        elif name == "apply_spec_augment":
            values[name] = False  # it masks at random
    rope = given.get("rope_parameters") or {}
    if "rope_theta" in rope and "mrope_section" in getattr(config, "ignore_keys_at_rope_validation", ()):
        values["rope_parameters"] = _sectioned(rope)
    if given.get("is_encoder_decoder"):
        values["decoder_start_token_id"] = END  # not all have a default
    for name in getattr(config, "sub_configs", {}):
        sub = getattr(config, name, None)
        if isinstance(sub, PreTrainedConfig):
            values[name] = {**_values(sub), "model_type": sub.model_type, **SPECIAL.get(sub.model_type, {})}
    for name, heads in (("num_key_value_heads", "num_attention_heads"), ("num_kv_heads", "num_attention_heads")):
        if name in values and given[name] == given.get(heads):
            values[name] = HEADS
    for name in _LISTS & given.keys():
        if isinstance(types := given[name], (list, tuple)) and name not in values:
            values[name] = _of_every_kind(list(types), LAYERS)
    return values


def _sectioned(rope_parameters: dict[str, Any]) -> dict[str, Any]:
    """Of the half of a head that turns: how much of it with time, with height and with width."""
    half = int(HEAD_DIM * rope_parameters.get("partial_rotary_factor", 1)) // 2
    return {**rope_parameters, "mrope_section": [half // 4, half // 4, half - 2 * (half // 4)]}


def _arguments(cls: type[PreTrainedConfig]) -> set[str]:
    """What can be given, and not what follows from it. Names that stand for others are left out."""
    own = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    own |= inspect.signature(cls.__init__).parameters.keys()
    return own - getattr(cls, "attribute_map", {}).keys()


def _of_every_kind(types: list, layers: int) -> list:
    kinds = list(dict.fromkeys(types))
    return [kinds[i % len(kinds)] for i in range(layers)]
