"""Tiny sizes of models for images: many have a list with one for each stage."""

from typing import Any

_PATCHES: dict[str, Any] = dict(image_size=32, patch_size=8)
_SWIN: dict[str, Any] = dict(
    image_size=32, patch_size=4, window_size=4, embed_dim=32, depths=[2, 2], num_heads=[4, 8], mlp_ratio=2.0
)
_CONVOLUTIONS: dict[str, Any] = dict(embedding_size=16, hidden_sizes=[32, 64], depths=[3, 3])
_PYRAMID: dict[str, Any] = dict(
    num_encoder_blocks=2,
    depths=[2, 2],
    hidden_sizes=[32, 64],
    strides=[4, 2],
    num_attention_heads=[2, 4],
    mlp_ratios=[2, 2],
)
_OVERLAPPING: dict[str, Any] = dict(_PYRAMID, sr_ratios=[2, 1], patch_sizes=[7, 3])

IMAGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("beit", "data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "ijepa", "vit", "vit_msn"), _PATCHES
    ),
    **dict.fromkeys(("clip", "metaclip_2", "siglip"), dict(vision_config=_PATCHES)),
    **dict.fromkeys(("swin", "swinv2", "donut-swin"), _SWIN),
    **dict.fromkeys(
        ("convnext", "convnextv2"), dict(image_size=32, num_stages=2, hidden_sizes=[16, 32], depths=[2, 2])
    ),
    "resnet": _CONVOLUTIONS,
    "bit": dict(_CONVOLUTIONS, num_groups=8),
    "regnet": dict(_CONVOLUTIONS, groups_width=8, layer_type="x"),
    "focalnet": dict(
        image_size=32,
        embed_dim=16,
        hidden_sizes=[32, 64],
        depths=[2, 2],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    "poolformer": dict(
        num_encoder_blocks=2, depths=[2, 2], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1]
    ),
    "segformer": dict(_OVERLAPPING, decoder_hidden_size=32),
    "pvt_v2": dict(_OVERLAPPING, image_size=32),
    "pvt": dict(_PYRAMID, image_size=32, sequence_reduction_ratios=[2, 1], patch_sizes=[4, 2]),
    "hiera": dict(image_size=[64, 64], embed_dim=32, depths=[1, 2, 2, 1], num_heads=[2, 4, 8, 16]),
    "mobilenet_v2": dict(image_size=32, classifier_dropout_prob=0.0),
    "mobilenet_v1": dict(image_size=32, classifier_dropout_prob=0.0),
    "mobilevit": dict(image_size=64, hidden_sizes=[32, 48, 64], neck_hidden_sizes=[8, 16, 24, 32, 40, 48, 64]),
    "efficientnet": dict(image_size=32, width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280),
    "levit": dict(image_size=64, hidden_sizes=[32, 48, 64], num_attention_heads=[2, 3, 4], depths=[2, 2, 2]),
    "swiftformer": dict(image_size=64, depths=[2, 2, 2, 2], embed_dims=[16, 24, 32, 48]),
}
"""As ``special.SPECIAL``, of which they are a part."""
