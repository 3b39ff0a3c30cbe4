"""What a user calls on the Trainer is done by all workers: they come to it first, and hear of one that fails in it.

Source: transformers/trainer.py. Names and signatures are those of the methods; ``install`` compares them.
"""

import contextlib
from collections.abc import Iterator

import transformers.trainer as host
from torch import nn

from ..compat import saves_on_every_rank
from ..engine.presence import announce, come_to, find_roll_call
from ..engine.shard import shard
from ..engine.sharded import find_sharded
from ..world.agreement import agree
from ..world.failures import failures_are_told
from .trainer_statistics import recalibrate_before_evaluation

_ORDER_OF_COLLECTIVES = (
    "max_steps", "num_train_epochs", "gradient_accumulation_steps", "max_grad_norm", "average_tokens_across_devices",
    "logging_strategy", "logging_steps", "logging_first_step", "eval_strategy", "eval_steps", "eval_delay",
    "eval_on_start", "save_strategy", "save_steps", "save_only_model", "load_best_model_at_end", "bf16", "fp16",
)  # fmt: skip
"""TrainingArguments that decide how often, and in which order, workers communicate."""


@contextlib.contextmanager
def _all_here(trainer, what: str | None) -> Iterator[None]:
    if find_roll_call(trainer.model) is None:
        yield
        return
    with failures_are_told():
        if what is not None:
            come_to(trainer.model, what)
        yield


def _train(original):
    def train(self, resume_from_checkpoint=None, trial=None, ignore_keys_for_eval=None):
        with _all_here(self, "train"):
            if find_roll_call(self.model) is not None:
                arguments = {name: getattr(self.args, name) for name in _ORDER_OF_COLLECTIVES}
                agree({"TrainingArguments": arguments}, "Give every worker the same.")
            return original(self, resume_from_checkpoint, trial, ignore_keys_for_eval)

    return train


def _evaluate(original):
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        with _all_here(self, "evaluate"):
            recalibrate_before_evaluation(self)
            return original(self, eval_dataset, ignore_keys, _of_what(self.model, metric_key_prefix))

    return evaluate


def _predict(original):
    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix="test"):
        with _all_here(self, "predict"):
            recalibrate_before_evaluation(self)
            return original(self, test_dataset, ignore_keys, _of_what(self.model, metric_key_prefix))

    return predict


def _of_what(model: nn.Module, prefix: str) -> str:
    """Names the metrics of a subnetwork so. Of several datasets the Trainer calls ``evaluate`` within ``evaluate``,
    with a prefix that is named already."""
    sharded = find_sharded(model)
    is_subnetwork = sharded is not None and sharded.held.config.evaluate == "subnetwork"
    return f"{prefix}_subnetwork" if is_subnetwork and "_subnetwork" not in prefix else prefix


def _save_model(original):
    on_every_rank = saves_on_every_rank(host.Trainer)

    def save_model(self, output_dir=None, _internal_call=False):
        with _all_here(self, None):  # after the training rank 0 may come alone
            if find_roll_call(self.model) is not None and find_sharded(self.model) is None:
                come_to(self.model, "save_model")
                shard(self.model, self.args.device)
            if not on_every_rank and not self.args.should_save and find_sharded(self.model) is not None:
                self._save(output_dir if output_dir is not None else self.args.output_dir)
            return original(self, output_dir, _internal_call)

    return save_model


def _maybe_log_save_evaluate(original):
    def _maybe_log_save_evaluate(
        self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None
    ):
        if self.control.should_log:
            announce(self.model, "logging")  # the host gathers the losses
        return original(self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate)

    return _maybe_log_save_evaluate


TOGETHER = {
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "save_model": _save_model,
    "_maybe_log_save_evaluate": _maybe_log_save_evaluate,
}
"""Trainer method -> its wrap."""
