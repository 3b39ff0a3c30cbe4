"""Gradient checkpointing: that of a phase, and what is refused because it would break or hang."""

from typing import Any

from torch import nn

from ..compat import checkpoint_activations, checkpointing_options
from ..config import SDPConfig
from ..errors import SDPConfigError
from ..plan.plan import Plan
from .phases import Schedule
from .state import SDPState


def recompute_as_the_phase_says(model: Any, schedule: Schedule) -> None:
    """Decoder layers are recomputed in phases that say so. What others have switched on stays."""
    if schedule.current.phase.gradient_checkpointing:
        if _recomputes(model) is None:
            checkpoint_activations(model)
            schedule.recomputes = _recomputes(model)
    elif schedule.recomputes is not None and _recomputes(model) is schedule.recomputes:
        model.gradient_checkpointing_disable()


def _recomputes(model: nn.Module) -> Any:
    """The function with which modules of transformers recompute their activations; None when they do not."""
    recomputed = (vars(module) for module in model.modules() if vars(module).get("gradient_checkpointing"))
    return next((own.get("_gradient_checkpointing_func") for own in recomputed), None)


def refuse_unsafe_checkpointing(model: nn.Module, state: SDPState) -> None:
    """As :func:`refuse_reentrant_checkpointing`, and where recomputation would break the order of collectives."""
    refuse_reentrant_checkpointing(model)
    if not state.held.config.reshard_after_forward or (recomputes := _recomputes(model)) is None:
        return
    refuse_reordered_recomputation(state.held.config, state.held.plan)
    if state.schedule is not None and recomputes is not state.schedule.recomputes:  # it stays in later phases
        for planned in state.schedule.phases:
            refuse_reordered_recomputation(planned.config, planned.plan)


def refuse_reordered_recomputation(config: SDPConfig, plan: Plan) -> None:
    """Raises SDPConfigError where gradient checkpointing would break the order of collectives."""
    if config.reshard_after_forward and recomputation_reorders(plan):
        raise SDPConfigError(
            "Gradient checkpointing with reshard_after_forward=True and "
            f"coverage={plan.coverage:.3g} would hang: some workers hold modules in several parts. "
            "Use reshard_after_forward=False, or a coverage of 1/k for all."
        )


def recomputation_reorders(plan: Plan) -> bool:
    """Whether recomputing a layer whose parts are gathered again breaks the order of collectives.

    Recomputation gathers the parts of a module in forward order, backward gathers them in reverse.
    """
    return plan.masking == "forward" and plan.level == "neuron" and bool(plan.split_modules)


def refuse_reentrant_checkpointing(model: nn.Module) -> None:
    """Raises SDPConfigError when reentrant gradient checkpointing is on: it bypasses FSDP2's backward hooks."""
    if any(checkpointing_options(module).get("use_reentrant") for module in model.modules()):
        raise SDPConfigError(
            "Gradient checkpointing with use_reentrant=True does not work with FSDP2. "
            "Use gradient_checkpointing_kwargs={'use_reentrant': False}."
        )
