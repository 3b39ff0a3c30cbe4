"""The forward of a patched model: its subnetwork in training, the full model in evaluation.

It is set on the instance and keeps its signature: the Trainer drops every dataset column that
``inspect.signature(model.forward)`` does not name.
"""

import functools
import inspect
from types import MethodType
from typing import TYPE_CHECKING

import torch

from ..errors import SDPConfigError, SDPStateError
from .state import get_state

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def install_forward(model: "PreTrainedModel") -> None:
    """Set the forward of a model whose state is already set."""
    state = get_state(model)
    held, run = state.held, state.run
    original_forward = model.forward.__func__
    signature = inspect.signature(model.forward)

    @functools.wraps(original_forward)
    def forward(self, *args, **kwargs):
        if held.simulated:
            if not self.training:
                return original_forward(self, *args, **kwargs)
            if torch.is_grad_enabled():
                run.cursor.subnetwork = run.next_micro_batch % held.plan.num_subnetworks
                run.next_micro_batch += 1
        elif not self.training and held.config.evaluate == "full":
            if run.full_forward is None:
                raise SDPStateError(
                    "Evaluation of a patched model needs the slices of all workers: prepare the model first "
                    "(Trainer.train, Trainer.evaluate or SDPAccelerator.prepare)."
                )
            return run.full_forward(*args, **kwargs)
        elif held.trains_full_forward:
            return original_forward(self, *args, **kwargs)
        return original_forward(self, *args, **_without_cache(signature, args, kwargs))

    run.own_forward = model.forward
    model.forward = MethodType(forward, model)
    # FSDP2 renames the class; the Trainer looks up by this name whether labels are shifted (label smoothing).
    model._get_name = lambda: held.model_name


def _without_cache(signature: inspect.Signature, args, kwargs) -> dict:
    """A subnetwork has no key/value cache: the parts of one attention would append to the same cache layer, and
    blocks that are not held would miss theirs. transformers' default is to make one, training included."""
    given = signature.bind_partial(*args, **kwargs).arguments
    for name in ("use_cache", "past_key_values"):
        if given.get(name) not in (None, False):
            raise SDPConfigError(
                f"{name}={type(given[name]).__name__}: a subnetwork cannot use a key/value cache. "
                "Call model.eval() for the full model, or leave it out."
            )
    if "use_cache" in signature.parameters and "use_cache" not in given:
        return {**kwargs, "use_cache": False}
    return kwargs
