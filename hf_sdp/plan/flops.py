"""FLOPs of a module in training."""

from torch import nn

from ..config import SDPConfig
from ..families.flops import Flops, ModelFlops
from ..families.inputs import LENGTH
from .units import MaskableModule


def training_flops(module: MaskableModule, of_model: ModelFlops) -> int:
    """FLOPs of forward and backward per token, of a whole module.

    Three times those of its forward: backward computes the gradients of both operands of each product. That is 6 for
    each weight that is multiplied (Kaplan et al., arXiv 2001.08361, section 2.1), and for attention 12 * heads *
    head_dim * sequence (PaLM, arXiv 2204.02311, appendix B). The causal mask is not taken off, as kernels without it
    compute everything.
    """
    return 3 * forward_flops(module, of_model).all


def forward_flops(module: MaskableModule, of_model: ModelFlops) -> Flops:
    return of_model.within((module.name, *module.members))


def sequence_of(model: nn.Module, config: SDPConfig) -> int:
    """Tokens of the sequences for which FLOPs are counted: the workload's; without one all positions of the model."""
    return config.workload.sequence if config.workload else getattr(model.config, "max_position_embeddings", LENGTH)
