"""``make_plan``: from a model and an SDPConfig to the Plan. A pure function, no processes."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedConfig

from .config import MAX_WORLD, SDPConfig
from .errors import SDPConfigError
from .families.adapters import without_peft
from .families.meta_model import meta_model
from .model.fitness import refuse_what_is_no_model
from .model.phases import Planned
from .model.state import find_state
from .options import is_positive
from .plan.dealing import plan_of
from .plan.even import replication
from .plan.flops import sequence_of
from .plan.plan import Plan


def make_plan(model_or_config, config: SDPConfig, num_subnetworks: int) -> Plan:
    """Deal the units of a model to subnetworks: a pure function of (shapes, config, N), no processes needed.

    Every subnetwork holds its coverage of each kind (attention, MLP) within one unit. With one coverage for all, every
    unit is held by exactly ``r = coverage * num_subnetworks`` of them. Else two units of the same depth differ by at
    most one holder. When every unit has two holders or more, the worker graph is connected.

    Args:
        model_or_config: a transformers model that is not patched yet, or its config (built on the meta device).
        num_subnetworks: N.
    Raises: SDPConfigError when the structure of the model cannot be found, nothing matches, or what is asked cannot be
        met; the message names the nearest coverage that can, or by how much the workers miss.
    """
    refuse_what_is_no_config(config)
    if not is_positive(num_subnetworks, int, MAX_WORLD):
        raise SDPConfigError(f"num_subnetworks must be an integer from 1 to {MAX_WORLD}, got {num_subnetworks!r}.")
    model = _as_model(model_or_config)
    refuse_what_is_no_model(model)
    model = without_peft(model)
    if find_state(model) is not None:
        raise SDPConfigError("This model is already patched. Plan for a newly made model, or its config.")
    if config.coverage_schedule is not None:
        raise SDPConfigError(
            "A coverage_schedule has a plan for each phase: make_plans makes them all. Where one is needed, give one "
            "phase's coverage."
        )
    if config.memory_gib is not None:
        from .estimate.capacity import fit  # the estimate traces a model: plans of given shares need none of it

        coverages = fit(model, config, num_subnetworks, lambda shares: plan_of(model, config, shares))
    else:
        coverages = _coverages(config, num_subnetworks)
    return plan_of(model, config, coverages)


def make_plans(model_or_config, config: SDPConfig, num_subnetworks: int) -> tuple[Planned, ...]:
    """The phases of ``config``, each with its plan as :func:`make_plan` makes it; without a schedule there is one.

    Returns: for each its ``phase``, ``config``, ``plan``, and the ``cost`` of a step in the unit of the schedule.
    Raises: SDPConfigError as there, also when a phase needs more than ``memory_gib``.
    """
    refuse_what_is_no_config(config)
    model = _as_model(model_or_config)
    phases = tuple(
        Planned(phase, of_phase, make_plan(model, of_phase, num_subnetworks)) for phase, of_phase in config.phases
    )
    if config.coverage_schedule is None:
        return phases
    model = without_peft(model)
    if config.memory_gib is not None:
        from .estimate.capacity import refuse_what_does_not_fit

        for planned in phases:
            refuse_what_does_not_fit(model, planned, config)
    if config.coverage_schedule_unit == "flops":
        from .estimate.figures import plan_figures

        sequence = sequence_of(model, config)
        for_one_worker_each = {"num_workers": num_subnetworks, "sequence": sequence, "element_bytes": 4}
        figures = [plan_figures(p.plan, model, p.config, **for_one_worker_each) for p in phases]
        flops = [sum(float(of_kind.mean()) for of_kind in f.flops.values()) for f in figures]
        phases = tuple(dataclasses.replace(p, cost=cost) for p, cost in zip(phases, flops, strict=True))
    return phases


def refuse_what_is_no_config(config: object) -> None:
    """Raises SDPConfigError for anything but an SDPConfig."""
    if not isinstance(config, SDPConfig):
        raise SDPConfigError(f"config must be an SDPConfig, got {type(config).__name__}.")


def _as_model(model_or_config):
    return meta_model(model_or_config) if isinstance(model_or_config, PreTrainedConfig) else model_or_config


def num_subnetworks_of(config: SDPConfig, num_workers: int) -> int:
    """N of a world of so many workers. Raises: SDPConfigError when it does not divide them."""
    number = config.num_subnetworks or num_workers
    if num_workers % number:
        divisors = [d for d in range(1, num_workers + 1) if num_workers % d == 0]
        raise SDPConfigError(
            f"num_subnetworks={number} does not divide the world of {num_workers} workers. Use one of {divisors}."
        )
    return number


def _coverages(config: SDPConfig, num_subnetworks: int) -> np.ndarray:
    """Share of each subnetwork, float64 of shape ``(N,)``."""
    if not isinstance(config.coverage, Sequence):
        replication(config.coverage, num_subnetworks)  # refuses what gives units no whole number of holders
        return np.full(num_subnetworks, float(config.coverage))
    if len(config.coverage) != num_subnetworks:
        raise SDPConfigError(
            f"coverage lists {len(config.coverage)} subnetworks {list(config.coverage)}, there are {num_subnetworks}. "
            f"Give one for each, or num_subnetworks={len(config.coverage)} for replicas of them."
        )
    return np.array(config.coverage)
