"""Text with an image in it, for tiny models that see."""

import torch

from hf_sdp.bench.support.tiny import VOCAB

TASK = "image-text-to-text"
IMAGE = 2
"""Token id of the places of an image."""
CONFIGS = {
    "llava": dict(image_token_index=IMAGE, vision_config=dict(image_size=28, patch_size=14)),
    "qwen2_vl": dict(image_token_id=IMAGE),
}
"""Model type -> overrides of its tiny config. An image is four tokens."""


def text_and_image(model_type: str, index: int = 0, *, with_image: bool = True) -> dict[str, torch.Tensor]:
    """Two sequences of 16 tokens, each with an image of four of them; with other tokens in its place without image."""
    generator = torch.Generator().manual_seed(1000 + index)
    ids = torch.randint(3, VOCAB, (2, 16), generator=generator)
    if not with_image:
        return {"input_ids": ids, "labels": ids}
    ids[:, 1:5] = IMAGE
    batch = {"input_ids": ids, "labels": ids.masked_fill(ids == IMAGE, -100)}
    if model_type == "llava":
        return batch | {"pixel_values": torch.randn(2, 3, 28, 28, generator=generator)}
    patches = torch.randn(2 * 4 * 4, 3 * 2 * 14 * 14, generator=generator)  # 2 x 2 of them are one token
    grid = torch.tensor([[1, 4, 4]] * 2)
    return batch | {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}
