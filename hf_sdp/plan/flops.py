"""FLOPs of a module in training, by formula."""

from ..families.kinds import head_dim
from .region import Shape
from .units import MaskableModule


def training_flops(module: MaskableModule, shapes: dict[str, Shape], model_config, sequence: int) -> float:
    """FLOPs of forward and backward per token, of a whole module at ``sequence`` tokens.

    6 for each weight that is multiplied (2 forward, 4 backward; Kaplan et al., arXiv 2001.08361, section 2.1).
    Attention also has 12 * heads * head_dim * sequence for its two products with the whole sequence (PaLM, arXiv
    2204.02311, appendix B). The causal mask is not taken off, as kernels without it compute everything.
    """
    flops = 6.0 * module.weight_numel(shapes)
    if module.of_kind.attends:
        text = model_config.get_text_config()
        flops += 12.0 * text.num_attention_heads * head_dim(text) * sequence
    return flops
