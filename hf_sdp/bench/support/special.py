"""What a model type needs besides tiny sizes."""

from typing import Any

_ALTERNATING = ["linear_attention", "full_attention"] * 2

SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1, 3], mamba_n_heads=16),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=4, rope_theta=1e4), ffn_config=dict(ffn_hidden_size=128, moe_top_k=2, hidden_size=64)
    ),
    "falcon_h1": dict(mamba_n_heads=16, mamba_d_head=8),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": dict(layer_types=_ALTERNATING, mamba_n_heads=16),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "mamba2": dict(num_heads=16),
    "xlstm": dict(num_heads=4, qk_dim_factor=1.0),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(attention_hidden_size=128, attention_head_dim=16, layers_block_type=["mamba", "hybrid"] * 2),
    "zaya": dict(num_experts_per_tok=1),
}
"""Model type -> arguments of its config. A dict goes into the values of the config of that name."""
