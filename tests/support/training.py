"""A loop of one's own with SDPAccelerator."""

import torch
import torch.distributed as dist

from hf_sdp import SDPAccelerator, SDPConfig, follow_schedule, patch_model
from tests.support.models import batch, tiny_model

EVERYTHING = dict(
    num_attention_heads=8, num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
)


def prepared(config: dict, model_options: dict | None = None, optimizer=torch.optim.AdamW, **accelerator_options):
    accelerator = SDPAccelerator(**accelerator_options)
    model = patch_model(tiny_model(**(model_options or {})), SDPConfig(**config))
    model, optimizer = accelerator.prepare(model, optimizer(model.parameters(), lr=1e-2))
    follow_schedule(model, 0, 100)
    return accelerator, model, optimizer


def one_step(accelerator, model, optimizer, micro_batches: int = 1):
    for micro in range(micro_batches):
        with accelerator.accumulate(model):
            inputs = batch(micro * dist.get_world_size() + dist.get_rank())
            accelerator.backward(model(**{name: t.to(accelerator.device) for name, t in inputs.items()}).loss)
            optimizer.step()
            optimizer.zero_grad()
