"""SIGTERM in a world of several workers: one checkpoint of all of them, and one end, after the same step.

With ``TrainingArguments(enable_jit_checkpoint=True)`` each worker of a plain Trainer saves by itself, as soon as it has
noticed its own signal. Workers notice theirs at different steps, or get none, and saving a sharded model is collective.
The host's handler of the signal stays (it waits 3 s, in which a SIGKILL would follow a mere end), and what it asks for
is agreed on. Source: transformers/trainer_jit_checkpoint.py.
"""

import logging

from transformers.trainer_jit_checkpoint import JITCheckpointCallback

from ..engine.sharded import find_sharded
from ..world.agreement import any_worker

logger = logging.getLogger(__name__)


class AgreedJITCheckpoint(JITCheckpointCallback):
    """As the host's for a model that is not sharded by SDP."""

    stopped = False

    def on_step_end(self, args, state, control, model=None, **kwargs):
        sharded = find_sharded(model)
        if sharded is None:
            super().on_step_end(args, state, control, **kwargs)
        elif self.jit_manager and any_worker(self.jit_manager.is_checkpoint_requested, sharded.control_group):
            self.stopped = control.should_save = control.should_training_stop = True
            if sharded.held.rank == 0:
                logger.warning("SIGTERM: saving a checkpoint of step %d, then training ends.", state.global_step)

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        if find_sharded(model) is None:
            super().on_epoch_end(args, state, control, **kwargs)
        elif self.stopped:  # what would come at the end of an epoch has no time any more
            control.should_save = control.should_evaluate = False

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if find_sharded(model) is None:
            super().on_step_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if find_sharded(model) is None:
            super().on_pre_optimizer_step(args, state, control, **kwargs)
