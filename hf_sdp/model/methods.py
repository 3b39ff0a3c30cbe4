"""The methods of a patched model that differ from its class: forward and save_pretrained.

They are set on the instance and keep their signatures: the Trainer drops every dataset column that
``inspect.signature(model.forward)`` does not name.
"""

import functools
import inspect
from types import MethodType

import torch
from torch import nn

from ..checkpoint.save import save_pretrained
from ..engine.exchange import consolidate
from ..errors import SDPConfigError, SDPStateError
from ..world.agreement import together
from .state import SDPState, get_state


def install(model: nn.Module) -> None:
    """Set the methods on a model whose state is already set."""
    state = get_state(model)
    original_forward = model.forward.__func__
    signature = inspect.signature(model.forward)

    @functools.wraps(original_forward)
    def forward(self, *args, **kwargs):
        if state.simulated and self.training:
            if torch.is_grad_enabled():
                state.cursor.subnetwork = state.next_micro_batch % state.plan.num_subnetworks
                state.next_micro_batch += 1
            return original_forward(self, *args, **_without_cache(signature, args, kwargs))
        if state.simulated or state.trains_full_forward and (self.training or state.sharded):
            return original_forward(self, *args, **kwargs)
        if self.training or state.config.evaluate == "subnetwork":
            return original_forward(self, *args, **_without_cache(signature, args, kwargs))
        if not state.sharded:
            raise SDPStateError(
                "Evaluation of a patched model needs the slices of all workers: prepare the model first "
                "(Trainer.train, Trainer.evaluate or SDPAccelerator.prepare)."
            )
        return state.shadow(*args, **kwargs)

    model.forward = MethodType(forward, model)
    if not state.simulated:
        model.save_pretrained = MethodType(_save_pretrained(model.save_pretrained), model)
    # FSDP2 renames the class; the Trainer looks up by this name whether labels are shifted (label smoothing).
    model._get_name = lambda: state.model_name


def refuse_unsafe_checkpointing(model: nn.Module, state: SDPState) -> None:
    """As :func:`refuse_reentrant_checkpointing`, and also where recomputation would break the order of collectives:
    with modules in several parts it gathers, in forward order, parts that backward gathers in reverse."""
    refuse_reentrant_checkpointing(model)
    if not state.config.reshard_after_forward or not (state.local_parts and state.plan.split_modules):
        return
    if any(vars(module).get("gradient_checkpointing") for module in model.modules()):
        raise SDPConfigError(
            f"Gradient checkpointing with reshard_after_forward=True and coverage={state.config.coverage} would hang: "
            "some workers hold modules in several parts. Use reshard_after_forward=False, or a coverage of 1/k for all."
        )


def refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """Raises SDPConfigError when reentrant gradient checkpointing is on: it bypasses FSDP2's backward hooks."""
    for module in model.modules():
        function = (
            getattr(module, "_gradient_checkpointing_func", None) if "gradient_checkpointing" in vars(module) else None
        )
        if (
            function is not None
            and module.gradient_checkpointing
            and getattr(function, "keywords", {}).get("use_reentrant")
        ):
            raise SDPConfigError(
                "Gradient checkpointing with use_reentrant=True does not work with FSDP2. "
                "Use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )


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


_NOT_GIVEN = object()


def _save_pretrained(original):
    @functools.wraps(original.__func__)
    def _save(self, save_directory, *args, state_dict=_NOT_GIVEN, **kwargs):
        """Saves the full model. Collective when ``state_dict`` is not given: call it on every worker, rank 0 writes."""
        if state_dict is None and get_state(self).rank != 0:
            return  # state_dict=accelerator.get_state_dict(model), which only rank 0 has
        if state_dict is not None and state_dict is not _NOT_GIVEN:
            return original(save_directory, *args, state_dict=dict(state_dict), **kwargs)  # the host empties its dict
        if not args and kwargs.keys() <= {"max_shard_size", "is_main_process"}:
            kwargs.pop("is_main_process", None)
            return save_pretrained(self, save_directory, **kwargs)
        weights = consolidate(self)  # push_to_hub, variant, ...: the host's way
        with together(get_state(self).control_group):
            if weights is not None:
                original(save_directory, *args, state_dict=weights, **kwargs)

    return _save
