"""The forward of a patched model: its subnetwork in training, the full model in evaluation.

The mode of the model decides, when the model is called, and whether its adapters are switched off. What is cut asks
what is being computed (``cut.CutModule``), whatever came between: another forward, a loss of one's own, the base model.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..compat import is_in_ddp
from ..errors import SDPConfigError, SDPStateError
from ..families.adapters import adapters_in_use
from .mixin import mix_in
from .state import Held, SDPState, get_state, refuse_changed

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PatchedModel(nn.Module):
    """Mixed into the class of a patched model."""

    def __call__(self, *args, **kwargs):
        held, run = get_state(self).held, get_state(self).run
        trains = self.training and not _is_of_a_reference(self, held)
        if held.simulated:
            run.cursor.trains = trains
            if not run.is_simulated_as_patched:
                refuse_changed(self, held)
                run.is_simulated_as_patched = True
            if trains and torch.is_grad_enabled():
                schedule = get_state(self).schedule
                if schedule is not None:
                    schedule.refuse_unfollowed(held.model_name)
                run.cursor.begin_forward(held.plan.num_subnetworks)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                run.cursor.trains = self.training
        if not run.is_sharded and is_in_ddp():
            raise SDPStateError(
                f"{held.model_name} is patched, and runs in DDP, which would average different slices of workers. With "
                "the Trainer use SDPCallback(), in a loop of your own SDPAccelerator, and hand over the patched model "
                "itself, not a module around it."
            )
        is_full = held.evaluates_full and not trains
        if not is_full:
            around: Callable[[], AbstractContextManager] = contextlib.nullcontext
        elif run.full_model is not None:
            around = run.full_model.forward
        else:
            raise SDPStateError(
                "Evaluation of a patched model needs the slices of all workers: prepare the model first "
                "(Trainer.train, Trainer.evaluate or SDPAccelerator.prepare)."
            )
        if not is_full and not held.trains_full_forward:
            _refuse_cache(type(self), args, kwargs)
        outer, run.computes = run.computes, "full" if is_full else "held"
        try:
            with around():
                return super().__call__(*args, **kwargs)
        finally:
            run.computes = outer

    def train(self, mode: bool = True):
        # Between two evaluations anybody may write into parameters: averaged weights that are swapped in, clipping,
        # load_state_dict. Torch does not notice what is written through .data.
        run = get_state(self).run
        run.cursor.trains = mode
        if run.full_model is not None:
            run.full_model.release()
        return super().train(mode)

    def state_dict(self, *args, **kwargs):
        if get_state(self).held.is_cut:
            raise SDPStateError(
                "state_dict() of a patched model has slices under the names of full parameters. Call "
                "hf_sdp.consolidate(model) on every worker for the full state dict (rank 0 gets it), "
                "hf_sdp.save_pretrained(model, folder) to save it, or hf_sdp.local_state_dict(model) for the slices. "
                "TRL asks for it with precompute_ref_log_probs=True: give its trainer a model of its own (ref_model)."
            )
        return super().state_dict(*args, **kwargs)

    def _get_name(self) -> str:
        # FSDP2 renames the class; the Trainer looks up by this name whether labels are shifted (label smoothing).
        return get_state(self).held.model_name


def _is_of_a_reference(model: nn.Module, held: Held) -> bool:
    """Whether a forward in training mode is to be that of evaluation: trainers that compare what they train with what
    it was switch the adapters off for it, or a copy of them on, and ask for no gradients."""
    return bool(held.adapters) and not torch.is_grad_enabled() and adapters_in_use(model) != held.adapters


class PatchedBase(nn.Module):
    """Mixed into the class of the base model: that which has the layers."""

    sdp_state: SDPState

    def __call__(self, *args, **kwargs):
        held, run = self.sdp_state.held, self.sdp_state.run
        if run.computes is None and run.is_sharded:
            raise SDPStateError(
                f"{type(self).__name__}, the base of a patched model, was called on its own. FSDP2 and the evaluation "
                "of the full model begin where the model is called: call the model itself, for example with "
                "output_hidden_states=True, or replace its forward by one that calls the base model."
            )
        computes_held = run.computes != "full" and not held.trains_full_forward
        if computes_held and not (held.simulated and not self.training):
            args, kwargs = _without_cache(type(self), args, kwargs)
        return super().__call__(*args, **kwargs)


class PatchedEncoder(nn.Module):
    """Mixed into the class of an encoder: generation calls it before the model."""

    sdp_model: nn.Module

    def __call__(self, *args, **kwargs):
        run = get_state(self.sdp_model).run
        if self.training or run.computes is not None or not run.is_sharded:
            return super().__call__(*args, **kwargs)
        # As the forward of the model, whose hooks gather, and wait for the other workers.
        own = vars(self.sdp_model)
        replaced = {"forward": own["forward"]} if "forward" in own else {}
        own["forward"] = super().__call__
        try:
            return self.sdp_model(*args, **kwargs)
        finally:
            del own["forward"]
            own.update(replaced)


def local_state_dict(model: nn.Module) -> dict[str, Any]:
    """``nn.Module.state_dict()`` of what this worker has: its slices by their local names, DTensors once sharded.

    Not collective. The full model's: :func:`hf_sdp.consolidate`.
    Raises: SDPConfigError when the model is not patched.
    """
    get_state(model)
    return nn.Module.state_dict(model)


def install_forward(model: "PreTrainedModel", *mixins: type) -> None:
    """Mix into the class of a model, whose state is set, and into those of its base model and its encoder.

    ``mixins``: of the model.
    """
    base, encoder = model.base_model, model.get_encoder()
    if base is model:
        mix_in(model, *mixins, PatchedModel, PatchedBase)
    else:
        mix_in(model, *mixins, PatchedModel)
        mix_in(base, PatchedBase)
    object.__setattr__(base, "sdp_state", get_state(model))
    if model.config.is_encoder_decoder and encoder not in (base, model):
        mix_in(encoder, PatchedEncoder)
        object.__setattr__(encoder, "sdp_model", model)  # not a child of its own child


@functools.cache
def _parameters(cls: type) -> tuple[str, ...]:
    """Names of the arguments of a model's own forward. (One that replaces it may have others.)"""
    forward: Any = cls.forward  # type: ignore[attr-defined]
    return tuple(inspect.signature(forward).parameters)[1:]


def _refuse_cache(cls: type, args: tuple, kwargs: dict[str, Any]) -> None:
    """A subnetwork has no key/value cache: the parts of one attention would append to the same cache layer, and
    blocks that are not held would miss theirs."""
    given = {**dict(zip(_parameters(cls), args, strict=False)), **kwargs}
    for name in ("use_cache", "past_key_values"):
        if given.get(name) not in (None, False):
            raise SDPConfigError(
                f"{name}={type(given[name]).__name__}: a subnetwork cannot use a key/value cache. "
                "Call model.eval() for the full model, or leave it out."
            )


def _without_cache(cls: type, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """transformers' default is to make a cache, training included."""
    if "use_cache" not in _parameters(cls):
        return args, kwargs
    place = _parameters(cls).index("use_cache")
    if place < len(args):
        return (*args[:place], False, *args[place + 1 :]), kwargs
    return args, {**kwargs, "use_cache": False}
