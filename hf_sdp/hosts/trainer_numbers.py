"""Numbers that the Trainer reports: the size of the full model, and the operations that workers compute.

Source: transformers/trainer.py (``floating_point_ops``, "Number of trainable parameters").
"""

import functools
from typing import Any

from ..model.numbers import local_num_parameters
from ..model.state import find_state, unwrap


def _floating_point_ops(original):
    def floating_point_ops(self, inputs):
        # The host multiplies by the parameters of the model; a worker computes with those of its subnetwork.
        of_the_model = original(self, inputs)
        state = find_state(self.model)
        if state is None or not state.held.is_cut:
            return of_the_model
        model: Any = unwrap(self.model)
        computed = local_num_parameters(model, exclude_embeddings=True)
        return of_the_model * computed // model.num_parameters(exclude_embeddings=True)

    return floating_point_ops


def of_the_full_model(original):
    @functools.wraps(original)
    def get_model_param_count(model, trainable_only=False):
        state = find_state(model)
        if state is None or not state.held.is_cut:
            return original(model, trainable_only)
        full: Any = unwrap(model)
        return full.num_parameters(only_trainable=trainable_only)

    return get_model_param_count


NUMBERS = {"floating_point_ops": _floating_point_ops}
"""Trainer method -> its wrap."""
