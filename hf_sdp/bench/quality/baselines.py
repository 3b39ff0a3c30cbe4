"""The baselines that SDP is asked about: dropout, stochastic depth, and a small homogeneous model."""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig

from ...config import SDPConfig
from ...errors import SDPConfigError
from ...families import structure_of
from ...families.absent import Absent
from ...families.meta_model import meta_model
from ...model.mixin import mix_in
from ...plan.units import maskable_modules
from ...planner import make_plan


def add_dropout(model: nn.Module, probability: float) -> None:
    """Ordinary dropout inside every residual branch, in place: in training each MLP neuron and each element of a head's
    output is zero with ``probability``, token by token, and the others are scaled by 1/(1-probability).

    These are the inputs of the row-wise layers (``down_proj``, ``o_proj``): what the neuron level of SDP cuts.
    Source: Srivastava et al., JMLR 15 (2014), in the inverted form of ``torch.nn.functional.dropout``.
    """

    def drop(module: nn.Module, inputs: tuple) -> tuple:
        return (F.dropout(inputs[0], probability, module.training), *inputs[1:])

    for module in maskable_modules(model, level="neuron", block_granularity="sub-block", chunks=1):
        for name, dim in module.dims.items():
            if dim == 1:
                model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(drop)


class RandomlySkipped(nn.Module):
    """Mixed into the class of a residual block's module.

    In training the block is absent from a micro-batch with probability 1-``survival``; in evaluation its output is
    multiplied by ``survival``. Source: arXiv 1603.09382, equations 2 and 5.
    """

    survival: float
    generator: torch.Generator
    skipped: nn.Module

    def forward(self, *args, **kwargs):
        if self.training:
            survives = torch.rand((), generator=self.generator) < self.survival
            return super().forward(*args, **kwargs) if survives else self.skipped(*args, **kwargs)
        return scaled_output(super().forward(*args, **kwargs), self.survival)


def scaled_output(output, scale: float):
    """Of a residual block's module: what is added to the residual stream is scaled."""
    return (output[0] * scale, *output[1:]) if isinstance(output, tuple) else output * scale


def skip_at_random(model: nn.Module, survival: float, *, linear: bool, seed: int) -> None:
    """Stochastic depth, in place, with a generator of its own (the order of the data does not depend on it).

    Args:
        survival: probability that a block survives; with ``linear`` the mean of probabilities that fall linearly
            with depth (arXiv 1603.09382, equation 4).
    Raises: SDPConfigError when the last block's probability would be negative.
    """
    blocks = maskable_modules(model, level="block", block_granularity="sub-block", chunks=1)
    absent = structure_of(model).absent
    probabilities = survival_probabilities(survival, len(blocks), linear=linear)
    generator = torch.Generator().manual_seed(seed)
    for block, probability in zip(blocks, probabilities, strict=True):
        module = model.get_submodule(block.name)
        skipped = Absent(type(module), absent[block.name])
        mix_in(module, RandomlySkipped)
        assert isinstance(module, RandomlySkipped)
        object.__setattr__(module, "skipped", skipped)  # not a child: names stay
        module.survival, module.generator = probability, generator


def survival_probabilities(mean: float, num_blocks: int, *, linear: bool) -> list[float]:
    """Of each block, first to last.

    ``linear``: 1 - l/L (1 - p_L) for l = 1..L, with p_L such that the mean is right.
    """
    if not linear:
        return [mean] * num_blocks
    last = 1 - 2 * num_blocks * (1 - mean) / (num_blocks + 1)
    if last < 0:
        lowest = 1 - (num_blocks + 1) / (2 * num_blocks)
        raise SDPConfigError(
            f"stochastic-depth-linear@{mean:g}: survival that falls linearly from 1 over {num_blocks} blocks has a "
            f"mean of at least {lowest:.3g}. Use more, or stochastic-depth."
        )
    return [1 - index / num_blocks * (1 - last) for index in range(1, num_blocks + 1)]


def expected_flops(model: nn.Module, count: Callable[[], int]) -> float:
    """The mean of ``count()``, FLOPs of one micro-batch, over the blocks that survive: it is a sum over blocks."""
    blocks = [module for module in model.modules() if isinstance(module, RandomlySkipped)]
    if not blocks:
        return count()
    probabilities = [block.survival for block in blocks]
    try:
        for block in blocks:
            block.survival = 0.0
        without = count()
        total: float = without
        for block, probability in zip(blocks, probabilities, strict=True):
            block.survival = 1.0
            total += probability * (count() - without)
            block.survival = 0.0
    finally:
        for block, probability in zip(blocks, probabilities, strict=True):
            block.survival = probability
    return total


def narrowed(config: PretrainedConfig, coverage: float, workers: int) -> PretrainedConfig:
    """The config of a homogeneous model as large as one worker's subnetwork (neuron level) of ``coverage``.

    Depth, vocabulary and numbers of heads stay. The width is the one with which the MLP's ratio to it, chosen to make
    the number of parameters right, comes closest to the full model's.
    Raises: SDPConfigError when there is none, or the coverage cannot be met.
    """
    wanted = numel_of_a_subnetwork(config, coverage, workers)
    ratio = config.intermediate_size / config.hidden_size
    best, deviation = None, math.inf
    for width in range(2 * config.num_attention_heads, config.hidden_size + 1, 2 * config.num_attention_heads):
        candidate = copy.deepcopy(config)
        candidate.hidden_size, candidate.head_dim = width, width // config.num_attention_heads
        candidate.intermediate_size = 1
        fixed = numel_of(candidate)
        candidate.intermediate_size = 2
        per_neuron = numel_of(candidate) - fixed
        candidate.intermediate_size = round((wanted - fixed) / per_neuron) + 1
        if candidate.intermediate_size < 1:
            continue
        off = abs(math.log(candidate.intermediate_size / width / ratio))
        if off < deviation:
            best, deviation = candidate, off
    if best is None:
        raise SDPConfigError(
            f"small@{coverage:g}: no narrower model of {config.num_hidden_layers} layers and "
            f"{config.num_attention_heads} heads has as few as {wanted:.0f} parameters. Use a higher coverage."
        )
    return best


def numel_of_a_subnetwork(config: PretrainedConfig, coverage: float, workers: int) -> float:
    """Parameters of a worker's subnetwork at neuron level, mean over workers: as many as a small model has.

    Raises: SDPConfigError when the coverage cannot be met.
    """
    plan = make_plan(config, SDPConfig(coverage=coverage), workers)
    return sum(map(plan.numel, range(workers))) / workers


def numel_of(config: PretrainedConfig) -> int:
    return sum(p.numel() for p in meta_model(config).parameters())
