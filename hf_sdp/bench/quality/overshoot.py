"""Whether the full model's residual branches overshoot: its loss with all of them scaled down.

Subnetworks that never train together each learn to be enough; in the full model their outputs add up.
"""

import contextlib
from collections.abc import Iterator, Sequence

from torch import nn
from transformers import Trainer

from ...plan.units import maskable_modules
from .baselines import scaled_output

SCALES = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Beside 1, the model as it is."""


def branches(model: nn.Module) -> list[str]:
    """Names of the modules whose outputs are added to the residual stream, of a model that is not patched."""
    return [m.name for m in maskable_modules(model, level="block", block_granularity="sub-block", chunks=1)]


@contextlib.contextmanager
def scaled(model: nn.Module, names: Sequence[str], scale: float) -> Iterator[None]:
    """Within it the outputs of these modules are multiplied by ``scale``."""
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: scaled_output(output, scale))
        for name in names
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def losses(trainer: Trainer, names: Sequence[str]) -> dict[str, float]:
    """Scale -> evaluation loss with the branches scaled by it."""
    found = {}
    for scale in SCALES:
        with scaled(trainer.model, names, scale):
            found[f"{scale:g}"] = trainer.evaluate(metric_key_prefix="scaled")["scaled_loss"]
    return found
