"""From shares to a plan: the units of a model are dealt to the subnetworks. A pure function, no processes."""

import functools
import logging
import math
from collections.abc import Sequence

import numpy as np
from torch import nn

from ..config import SDPConfig
from ..errors import SDPConfigError
from ..families import structure_of
from ..families.flops import flops_of
from ..families.kinds import ATTENTION, EXPERTS, MIXER, MLP
from .even import deal, reduced, replication
from .flops import sequence_of, training_flops
from .holders import Holders
from .plan import Plan
from .stages import Sized, deal_stages
from .uneven import MAX_DENOMINATOR, deal_blocks, deal_chunks, denominator, depth_shares, orders
from .units import MaskableModule, maskable_modules, why_whole
from .worker_graph import groups_that_share

logger = logging.getLogger(__name__)

Stack = list[MaskableModule]
"""The modules of one kind and number of units, in order of depth."""


def plan_of(model: nn.Module, config: SDPConfig, coverages: np.ndarray) -> Plan:
    """The plan in which subnetwork w holds the share ``coverages[w]``, whatever ``config`` says of it."""
    num_subnetworks = len(coverages)
    r = replication(float(coverages[0]), num_subnetworks) if _is_one_share(config, coverages) else None
    if r is not None and config.balance == "memory":
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
    if r is not None and config.level == "block" and len({stage(m.layer) for m in modules}) > 1:
        _check_evenly(list(stacks.values()), config, num_subnetworks, r)
        blocks = [
            Sized(m.kind, stage(m.layer), _weight(m, shapes, model, config)) for stack in stacks.values() for m in stack
        ]
        of_blocks = iter(deal_stages(blocks, num_subnetworks=num_subnetworks, r=r, seed=config.seed))
        dealt = [[(next(of_blocks),) for _ in stack] for stack in stacks.values()]
    elif r is not None and config.balance == "memory":
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
    _check_connected(plan)
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
            f"coverage={r / num_subnetworks:g} of {num_subnetworks} subnetworks gives {r} holders per unit, "
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
    return float(training_flops(module, flops_of(model, sequence_of(model, config))))


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


def _check_connected(plan: Plan) -> None:
    if plan.replication[0] < 2:
        return
    groups = groups_that_share(plan)
    if len(groups) > 1:
        shown = [f"{sorted(group)[:8]}{'...' * (len(group) > 8)}" for group in sorted(groups, key=min)[:8]]
        raise SDPConfigError(
            f"{len(plan.modules)} maskable modules are too few to connect {plan.num_subnetworks} subnetworks at "
            f"coverage {plan.coverage:.3g}: {', '.join(shown)} would share no unit and drift apart. Use a higher "
            "coverage, fewer subnetworks (num_subnetworks), or level='neuron'."
        )
