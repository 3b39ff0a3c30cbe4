"""FLOPs of a module in training, by formula."""

import math

from .units import MaskableModule


def training_flops(module: MaskableModule, shapes: dict[str, tuple[int, ...]], model_config, sequence: int) -> float:
    """FLOPs of forward and backward per token, of a whole module at ``sequence`` tokens.

    6 for each weight that is multiplied (2 forward, 4 backward; Kaplan et al., arXiv 2001.08361, section 2.1), and for attention
    12 * heads * head_dim * sequence for its two products with the whole sequence (PaLM, arXiv 2204.02311, appendix B; the
    causal mask is not taken off, as kernels without it compute everything).
    """
    weights = sum(math.prod(shapes[name]) for name in module.dims if len(shapes[name]) == 2)
    flops = 6.0 * weights
    if module.kind != "mlp":
        text = model_config.get_text_config()
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        flops += 12.0 * text.num_attention_heads * head_dim * sequence
    return flops
