"""``SDPConfig.recalibrate_batches`` under the Trainer."""

import torch

from ..engine.sharded import find_sharded
from ..engine.statistics import recalibrate
from ..model.state import find_state


def recalibrate_before_evaluation(trainer) -> None:
    """Estimate the full model's running statistics from training data, if that is asked for and weights have changed
    since. Collective. The process draws what it would without this."""
    state = find_state(trainer.model)
    number = None if state is None else state.held.config.recalibrate_batches
    if state is None or number is None:
        return
    is_simulated = state.held.simulated  # there nobody counts the changes
    if not is_simulated and (find_sharded(trainer.model) is None or state.run.recalibrated == state.run.version):
        return
    loader = trainer.get_train_dataloader()
    references = trainer.accelerator.gradient_state.dataloader_references
    try:
        with torch.random.fork_rng(devices=[]):
            recalibrate(trainer.model, loader, number)
    finally:
        if any(reference is loader for reference in references):  # it did not come to its end
            loader.end()
