"""``make_plan``: from a model and an SDPConfig to the Plan. A pure function, no processes."""

import dataclasses
import functools
import logging
import math
from collections.abc import Sequence

import numpy as np
from torch import nn
from transformers import PreTrainedConfig

from .config import MAX_WORLD, SDPConfig
from .errors import SDPConfigError
from .families import structure_of
from .families.adapters import without_peft
from .families.flops import flops_of
from .families.inputs import LENGTH
from .families.kinds import ATTENTION, EXPERTS, MIXER, MLP
from .families.meta_model import meta_model
from .model.fitness import refuse_what_is_no_model
from .model.phases import Planned
from .model.state import find_state
from .options import is_positive
from .plan.even import deal, reduced, replication
from .plan.flops import training_flops
from .plan.holders import Holders
from .plan.plan import Plan
from .plan.stages import Sized, deal_stages
from .plan.uneven import MAX_DENOMINATOR, deal_blocks, deal_chunks, denominator, depth_shares, orders
from .plan.units import MaskableModule, maskable_modules, why_whole
from .plan.worker_graph import components

logger = logging.getLogger(__name__)

Stack = list[MaskableModule]
"""The modules of one kind and number of units, in order of depth."""


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
    if not isinstance(config, SDPConfig):
        raise SDPConfigError(f"config must be an SDPConfig, got {type(config).__name__}.")
    if not is_positive(num_subnetworks, int, MAX_WORLD):
        raise SDPConfigError(f"num_subnetworks must be an integer from 1 to {MAX_WORLD}, got {num_subnetworks!r}.")
    if isinstance(model_or_config, PreTrainedConfig):
        model_or_config = meta_model(model_or_config)
    refuse_what_is_no_model(model_or_config)
    model_or_config = without_peft(model_or_config)
    if find_state(model_or_config) is not None:
        raise SDPConfigError("This model is already patched. Plan for a newly made model, or its config.")
    if config.coverage_schedule is not None:
        raise SDPConfigError(
            "A coverage_schedule has a plan for each phase: make_plans makes them all. Where one is needed, give one "
            "phase's coverage."
        )
    model = model_or_config
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
    phases = tuple(
        Planned(phase, of_phase, make_plan(model_or_config, of_phase, num_subnetworks))
        for phase, of_phase in config.phases
    )
    if config.coverage_schedule is None:
        return phases
    model = meta_model(model_or_config) if isinstance(model_or_config, PreTrainedConfig) else model_or_config
    model = without_peft(model)
    if config.memory_gib is not None:
        from .estimate.capacity import refuse_what_does_not_fit

        for planned in phases:
            refuse_what_does_not_fit(model, planned, config)
    if config.coverage_schedule_unit == "flops":
        from .estimate.figures import plan_figures

        sequence = _sequence(model, config)
        for_one_worker_each = {"num_workers": num_subnetworks, "sequence": sequence, "element_bytes": 4}
        figures = [plan_figures(p.plan, model, p.config, **for_one_worker_each) for p in phases]
        flops = [sum(float(of_kind.mean()) for of_kind in f.flops.values()) for f in figures]
        phases = tuple(dataclasses.replace(p, cost=cost) for p, cost in zip(phases, flops, strict=True))
    return phases


def num_subnetworks_of(config: SDPConfig, num_workers: int) -> int:
    """N of a world of so many workers. Raises: SDPConfigError when it does not divide them."""
    number = config.num_subnetworks or num_workers
    if num_workers % number:
        divisors = [d for d in range(1, num_workers + 1) if num_workers % d == 0]
        raise SDPConfigError(
            f"num_subnetworks={number} does not divide the world of {num_workers} workers. Use one of {divisors}."
        )
    return number


def plan_of(model: nn.Module, config: SDPConfig, coverages: np.ndarray) -> Plan:
    """The plan in which subnetwork w holds the share ``coverages[w]``, whatever ``config`` says of it."""
    num_subnetworks = len(coverages)
    one_share = _is_one_share(config, coverages)
    is_even = one_share and config.balance == "memory"
    if one_share:
        r = replication(float(coverages[0]), num_subnetworks)
    if is_even:
        chunks = reduced(r, num_subnetworks)[1]
    else:
        chunks = denominator(depth_shares(coverages, 3, config.depth_profile))
    modules = maskable_modules(
        model,
        level=config.level,
        block_granularity=config.block_granularity,
        chunks=chunks if config.level == "neuron" else 1,
    )
    always_held = _always_held(config, max(module.layer for module in modules) + 1)
    stacks: dict[tuple[str, int], Stack] = {}
    for module in modules:
        if module.layer not in always_held:
            stacks.setdefault((module.kind, module.num_units), []).append(module)
    if config.level == "block":
        _join_small(stacks, float(coverages.min()))
    everyone = tuple(range(num_subnetworks))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    unit_holders: dict[str, Sequence[Holders]] = {m.name: (everyone,) * m.num_units for m in modules}
    stage = structure_of(model).stage
    if one_share and config.level == "block" and len({stage(m.layer) for m in modules}) > 1:
        _check_evenly(list(stacks.values()), config, num_subnetworks, r)
        blocks = [
            Sized(m.kind, stage(m.layer), _weight(m, shapes, model, config)) for stack in stacks.values() for m in stack
        ]
        of_blocks = iter(deal_stages(blocks, num_subnetworks=num_subnetworks, r=r, seed=config.seed))
        dealt = [[(next(of_blocks),) for _ in stack] for stack in stacks.values()]
    elif is_even:
        _check_evenly(list(stacks.values()), config, num_subnetworks, r)
        dealt = _deal_evenly(list(stacks.values()), config, num_subnetworks, r)
    else:
        weights = [_weight(stack[0], shapes, model, config) for stack in stacks.values()]
        dealt = _deal_unevenly(list(stacks.values()), config, coverages, chunks, weights)
    for stack, holders in zip(stacks.values(), dealt, strict=True):
        unit_holders.update({m.name: of_units for m, of_units in zip(stack, holders, strict=True)})
    _say_what_is_whole(model, config, modules)
    plan = Plan.of_units(
        level=config.level,
        masking=config.masking,
        num_subnetworks=num_subnetworks,
        always_held=always_held,
        shapes=shapes,
        modules=tuple(modules),
        unit_holders=unit_holders,
    )
    _check_connected(plan, config)
    return plan


def _say_what_is_whole(model: nn.Module, config: SDPConfig, modules: list[MaskableModule]) -> None:
    """Memory and compute of what all workers hold do not fall with the coverage: nobody should find out later."""
    reasons = why_whole(model, config.level, config.block_granularity)
    if reasons:
        kinds = ", ".join(dict.fromkeys(module.of_kind.title for module in modules))
        _warn_once(
            f"{type(model).__name__}: of its layers, only {kinds} is held in part, and not everywhere: "
            f"{'; '.join(reasons[:3])}{' ...' * (len(reasons) > 3)}. All workers hold the rest."
        )


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def _join_small(stacks: dict[tuple[str, int], Stack], coverage: float) -> None:
    """Where a model has fewer blocks of a kind than give every worker one (dense layers among experts, attention among
    other mixers), they are dealt with those that do the same work."""
    for kind, others in ((MLP, EXPERTS), (EXPERTS, MLP), (ATTENTION, MIXER), (MIXER, ATTENTION)):
        few, many = (kind.name, 1), (others.name, 1)
        if few in stacks and many in stacks and len(stacks[few]) * coverage < 1 - 1e-9:
            stacks[many] = sorted([*stacks[many], *stacks.pop(few)], key=lambda module: module.layer)


def _is_one_share(config: SDPConfig, coverages: np.ndarray) -> bool:
    """Whether every unit of every layer has the same number of holders, and every subnetwork the same share."""
    whole = abs(coverages.sum() - round(coverages.sum())) < 1e-6
    return bool(np.all(coverages == coverages[0])) and whole and config.depth_profile == "uniform"


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


def _always_held(config: SDPConfig, num_layers: int) -> tuple[int, ...]:
    """Layers that every subnetwork holds, counted from the first."""
    for layer in config.always_held:
        if not -num_layers <= layer < num_layers:
            raise SDPConfigError(
                f"always_held={list(config.always_held)}: the model has {num_layers} layers, no layer {layer}."
            )
    layers = tuple(sorted({layer % num_layers for layer in config.always_held}))
    if len(layers) == num_layers:
        raise SDPConfigError(
            f"always_held={list(config.always_held)} are all {num_layers} layers: nothing is left to deal. Name fewer."
        )
    return layers


def _check_evenly(stacks: list[Stack], config: SDPConfig, num_subnetworks: int, r: int) -> None:
    if r < config.min_replication:
        raise SDPConfigError(
            f"coverage={config.coverage} of {num_subnetworks} subnetworks gives {r} holders per unit, "
            f"{config.min_replication - r} less than min_replication={config.min_replication}. "
            f"Nearest coverage that can be met: {min(config.min_replication / num_subnetworks, 1):g}."
        )
    for stack in stacks:
        _check_every_worker_gets_some(config, stack, r / num_subnetworks, 1 / num_subnetworks)


def _deal_evenly(stacks: list[Stack], config: SDPConfig, num_subnetworks: int, r: int) -> list:
    kinds = list(dict.fromkeys(stack[0].kind for stack in stacks))
    result = []
    for stack in stacks:
        result.append(
            deal(
                num_units=stack[0].num_units,
                depth=len(stack),
                kind_index=kinds.index(stack[0].kind),
                num_subnetworks=num_subnetworks,
                r=r,
                seed=config.seed,
            )
        )
    return result


def _deal_unevenly(
    stacks: list[Stack], config: SDPConfig, coverages: np.ndarray, chunks: int, weights: list[float]
) -> list:
    if config.level == "neuron":
        by_turn = orders(depth_shares(coverages, 3, config.depth_profile), chunks, config.seed)
    else:
        # Half a (smallest) holder set further for the next kind: the full model is evaluated with both blocks of a
        # layer, and with neighbouring layers, so some workers must train them together.
        half = int(depth_shares(coverages, 3, config.depth_profile).sum(1).min() // 2)
        n = len(coverages)
        by_turn = [np.roll(np.arange(n), (config.seed - kind * half) % n) for kind in range(len(stacks))]
    debt = np.zeros(len(coverages))
    result = []
    for kind_index, (stack, weight) in enumerate(zip(stacks, weights, strict=True)):
        if config.depth_profile == "linear" and len(stack) < 2:
            raise SDPConfigError(
                f"depth_profile='linear' has no effect on {len(stack)} {stack[0].kind}. Use 'uniform'."
            )
        shares = depth_shares(coverages, len(stack), config.depth_profile)
        least = float(shares.min() if config.level == "neuron" else shares.mean(0).min())
        _check_every_worker_gets_some(config, stack, least, 1 / MAX_DENOMINATOR)
        _check_replication(config, stack, shares)
        if config.level == "neuron":
            result.append(deal_chunks(shares, stack[0].num_units, chunks, by_turn, kind_index))
        else:
            dealt, debt = deal_blocks(shares, chunks, by_turn[kind_index], weight, debt)
            result.append(dealt)
    return result


def _weight(module: MaskableModule, shapes: dict[str, tuple[int, ...]], model, config: SDPConfig) -> float:
    """What ``config.balance`` balances, of one module."""
    if config.balance == "memory":
        return float(module.numel(shapes))
    return float(training_flops(module, flops_of(model, _sequence(model, config))))


def _sequence(model, config: SDPConfig) -> int:
    """Tokens of a sequence, for counting FLOPs."""
    return config.workload.sequence if config.workload else getattr(model.config, "max_position_embeddings", LENGTH)


def _check_replication(config: SDPConfig, stack: Stack, shares: np.ndarray) -> None:
    found = shares.sum(1)
    if found.min() < config.min_replication - 1e-9:
        worst = stack[int(found.argmin())]
        raise SDPConfigError(
            f"What the {shares.shape[1]} subnetworks hold of {worst.name} adds up to {found.min():.4g} of it; "
            f"min_replication={config.min_replication} misses {config.min_replication - found.min():.4g} (in copies "
            "of the maskable parameters). Raise some coverages by that much in all, or take more workers."
        )


def _check_every_worker_gets_some(config: SDPConfig, stack: Stack, share: float, step: float) -> None:
    """At neuron level something of every module (no empty layers), at block level one block of every kind.

    ``share``: the least that a subnetwork has of the stack, at neuron level of one of its modules. ``step``: coverages
    are multiples of it.
    """
    kind = stack[0].of_kind
    units = stack[0].num_units if config.level == "neuron" else len(stack)
    if units * share >= 1 - 1e-9:
        return
    nearest = math.ceil(1 / (units * step) - 1e-9) * step
    what = f"{units} {kind.unit_name if config.level == 'neuron' else f'{kind.name} units'}"
    remedy = (
        f"Nearest coverage that can be met: {nearest:g}." if nearest <= 1 else "No coverage of this model can be met."
    )
    if config.level == "block" and nearest > 0.5:  # a model's one dense layer
        remedy += f" Or let all hold what is so rare: always_held={sorted({module.layer for module in stack})}."
    raise SDPConfigError(f"coverage={share:g} of {what} is less than one unit per worker. {remedy}")


def _check_connected(plan: Plan, config: SDPConfig) -> None:
    if plan.replication[0] < 2:
        return
    groups = groups_that_share(plan)
    if len(groups) > 1:
        shown = [f"{sorted(group)[:8]}{'...' * (len(group) > 8)}" for group in sorted(groups, key=min)[:8]]
        raise SDPConfigError(
            f"{len(plan.modules)} maskable modules are too few to connect {plan.num_subnetworks} subnetworks at "
            f"coverage {config.coverage}: {', '.join(shown)} would share no unit and drift apart. Use a higher "
            "coverage, fewer subnetworks (num_subnetworks), or level='neuron'."
        )


def groups_that_share(plan: Plan) -> list[set[int]]:
    """Subnetworks in groups between which no unit is shared: one, where the worker graph is connected."""
    dealt = {number for module in plan.dealt for number in plan.set_of_unit[module.name]}
    return components(plan.num_subnetworks, (plan.holder_sets[number] for number in sorted(dealt)))
