"""What a model type needs besides tiny sizes."""

from typing import Any

from .images import IMAGES

_ALTERNATING = ["linear_attention", "full_attention"] * 2

_BERT = dict(
    model_type="bert", hidden_size=64, num_hidden_layers=4, num_attention_heads=8, intermediate_size=128,
    vocab_size=128, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip

_SLIDING = dict(
    num_attention_heads=8, num_key_value_heads=8, q_lora_rank=16, kv_lora_rank=16, head_dim=16, qk_nope_head_dim=8,
    v_head_dim=8, qk_rope_head_dim=8,
)  # fmt: skip

SPECIAL: dict[str, dict[str, Any]] = {
    **IMAGES,
    "bamba": dict(attn_layer_indices=[1, 3], mamba_n_heads=16),
    "blt": dict(encoder_hash_byte_group_vocab=256),
    "chameleon": dict(vocabulary_map={"<image>": 2}),
    "cohere_compass_text": dict(
        layer_types=["full_attention", "sliding_attention"] * 2,
        rope_parameters={
            kind: dict(rope_type="default", rope_theta=1e4) for kind in ("full_attention", "sliding_attention")
        },
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=4, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=128, moe_top_k=2, hidden_size=64),
    ),
    "deepseek_ocr2_text": dict(mlp_layer_types=["dense", "sparse"] * 2),
    "dots3_note": dict(
        vision_config=dict(adapter_in_dim=64, adapter_out_dim=64),
        audio_config=dict(adapter_input_size=64, adapter_out_dim=64),
    ),
    "dots3_note_text": dict(n_group=1, topk_group=1, per_layer_config=dict.fromkeys("13", _SLIDING)),
    "emu3": dict(vocabulary_map={"<image>": 2}),
    "encoder-decoder": dict(
        encoder=_BERT,
        decoder=dict(_BERT, is_decoder=True, add_cross_attention=True),
        decoder_start_token_id=1,
        pad_token_id=0,
    ),
    "esm": dict(pad_token_id=1, mask_token_id=32),
    "falcon_h1": dict(mamba_n_heads=16, mamba_d_head=8),
    "florence2": dict(vision_config=dict(embed_dim=[16, 32, 64, 64])),
    "fun_asr_nano": dict(adaptor_config=dict(intermediate_size=16)),
    "funnel": dict(block_sizes=[2, 2], num_decoder_layers=2, d_inner=128),
    "glm5_next_text": dict(index_kpool=4, qk_rope_head_dim=0),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "granitemoehybrid": dict(layer_types=_ALTERNATING, mamba_n_heads=16),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "layoutlmv3": dict(coordinate_size=8, shape_size=16),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "lilt": dict(hidden_size=96),  # of six coordinates
    "longcat_flash": dict(zero_expert_num=0),  # experts that pass on what they get are no zeros without weights
    "mamba2": dict(num_heads=16),
    "inkling2_text": dict(layer_types=["hybrid", "hybrid_sliding"] * 2),
    "moonshine_streaming": dict(num_key_value_heads=8),
    "nemotron_h": dict(layers_block_type=["linear_attention", "moe", "full_attention", "mlp"] * 2),
    "nemotron_h_omni": dict(vision_config=dict(video_temporal_patch_size=2)),
    "neomme": dict(head_dim=16, num_attention_heads=4, num_key_value_heads=2),
    "paddleocr_vl_text": dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2])),
    "perceiver": dict(
        d_latents=64,
        d_model=64,
        num_latents=16,
        num_self_attends_per_block=4,
        max_position_embeddings=32,
        num_self_attention_heads=8,
        num_cross_attention_heads=8,
    ),  # fmt: skip
    "qwen4_exp_text": dict(
        indexer_n_heads=4,
        indexer_kv_heads=1,
        indexer_head_dim=16,
        indexer_budget=8,
        indexer_compress_ratio=2,
        ngram_vocab_size_base=64,
        hc_lowrank=16,
    ),  # fmt: skip
    "reformer": dict(axial_pos_embds=False, is_decoder=True),
    "speech-encoder-decoder": dict(
        encoder=dict(
            model_type="wav2vec2",
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=8,
            intermediate_size=128,
            conv_dim=[64, 64],
            conv_stride=[20, 16],
            conv_kernel=[20, 16],
            num_feat_extract_layers=2,
            apply_spec_augment=False,
            layerdrop=0.0,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            feat_proj_dropout=0.0,
        ),  # fmt: skip
        decoder=dict(_BERT, is_decoder=True, add_cross_attention=True),
        decoder_start_token_id=1,
        pad_token_id=0,
    ),
    "step3p5": dict(sliding_window=8),
    "xlstm": dict(num_heads=4, qk_dim_factor=1.0, chunk_size=32),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(attention_hidden_size=128, attention_head_dim=16, layers_block_type=["mamba", "hybrid"] * 2),
    "zaya": dict(num_experts_per_tok=1),
}
"""Model type -> arguments of its config. A dict goes into the values of the config of that name."""
