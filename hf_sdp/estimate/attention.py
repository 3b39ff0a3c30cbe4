"""Attention on the meta device: what the kernels of CPU and CUDA save."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.integrations.sdpa_attention import create_position_bias_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "hf_sdp_on_meta"  # a name with "flash" would be looked up on the hub
_aten = torch.ops.aten


def _flash_on_meta(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: torch.Tensor | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention that saves query, key, value, output and the logarithms of the sums, as the flash kernels of CPU and
    CUDA do; on the meta device PyTorch would take the path that saves the scores.

    That is what it takes for biases that learn (T5, and Swin, whose mask they are in): the CPU has no kernel with their
    gradients. A mask comes from a layer itself: those of transformers (padding) are made for names that it knows.
    """
    dtype = getattr(module.config, "_hf_sdp_attention_dtype", None)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    bias = attention_mask
    if position_bias is not None:
        bias = create_position_bias_mask(position_bias, None, getattr(module, "is_causal", True), query, key)
    if bias is not None and bias.requires_grad:
        output = F.scaled_dot_product_attention(query, key, value, bias, scale=scaling)
    elif query.shape[-1] != value.shape[-1]:  # latent attention: CUDA has another kernel, which saves the same
        kernel = _aten._scaled_dot_product_efficient_attention
        output, *_ = kernel(query, key, value, None, True, 0.0, True, scale=scaling)
    else:
        kernel = _aten._scaled_dot_product_flash_attention_for_cpu
        output, _ = kernel(query, key, value, 0.0, True, attn_mask=bias, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _flash_on_meta)
