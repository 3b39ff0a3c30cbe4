"""Gradient checkpointing that would break or hang is refused."""

from torch import nn

from ..compat import checkpointing_options
from ..errors import SDPConfigError
from ..plan.plan import Plan
from .state import SDPState


def refuse_unsafe_checkpointing(model: nn.Module, state: SDPState) -> None:
    """As :func:`refuse_reentrant_checkpointing`, and where recomputation would break the order of collectives."""
    refuse_reentrant_checkpointing(model)
    if not state.held.config.reshard_after_forward or not recomputation_reorders(state.held.plan):
        return
    if any(vars(module).get("gradient_checkpointing") for module in model.modules()):
        raise SDPConfigError(
            "Gradient checkpointing with reshard_after_forward=True and "
            f"coverage={state.held.config.coverage} would hang: some workers hold modules in several parts. "
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
