"""The figures of a plan: what each subnetwork holds, computes and sends, and how evenly. Defined in PLAN.md."""

from dataclasses import dataclass
from functools import reduce

import numpy as np
from torch import nn

from ..config import SDPConfig
from ..families import structure_of
from ..families.flops import ModelFlops, flops_of
from ..plan.flops import forward_flops, training_flops
from ..plan.holdings import Holdings
from ..plan.plan import Plan
from ..plan.worker_graph import components, spectral_gap
from ..world.ring import BOTH_WAYS, sent_in_ring

SHARED = "shared"
"""Instead of a kind: what all workers hold and is no part of a maskable module."""


@dataclass(frozen=True)
class PlanFigures:
    """Arrays have one number for each subnetwork, shape ``(N,)``.

    Kinds are the names of those in ``families.kinds`` that the plan has, and :data:`SHARED`.

    Attributes:
        num_workers: W; worker w holds subnetwork w mod N.
        sequence: tokens of a sequence, for attention's FLOPs.
        element_bytes: of an element on the wire.
        parameters, full_parameters: kind -> elements held, and those of the full model.
        flops, full_flops: kind -> FLOPs of forward and backward for one token.
        bytes_sent: by one worker in one optimizer step.
        coverage: share held of the elements that are dealt: maskable ones, without layers that are always held.
        unit_holders: holders of each unit that is dealt, in forward order, shape ``(units,)``.
        num_holder_sets: distinct ones (each is a communicator), that of the shared parameters included.
        num_components, spectral_gap: of the worker graph; the gap is None where it was too much to compute.
    """

    num_subnetworks: int
    num_workers: int
    sequence: int
    element_bytes: int
    parameters: dict[str, np.ndarray]
    full_parameters: dict[str, int]
    flops: dict[str, np.ndarray]
    full_flops: dict[str, int]
    bytes_sent: np.ndarray
    coverage: np.ndarray
    unit_holders: np.ndarray
    num_holder_sets: int
    num_components: int
    spectral_gap: float | None

    def summary(self) -> dict:
        """Over subnetworks (replication: over units), as plain numbers."""
        parameters, flops = reduce(np.add, self.parameters.values()), reduce(np.add, self.flops.values())
        return {
            "coverage": spread(self.coverage),
            "replication": spread(self.unit_holders),
            "num_units": len(self.unit_holders),
            "num_holder_sets": self.num_holder_sets,
            "parameters": spread(parameters),
            "parameters_full": sum(self.full_parameters.values()),
            "parameters_straggler_ratio": straggler_ratio(parameters),
            "flops_per_token": spread(flops),
            "flops_per_token_full": sum(self.full_flops.values()),
            "flops_straggler_ratio": straggler_ratio(flops),
            "bytes_sent_per_step": spread(self.bytes_sent),
            "bytes_sent_straggler_ratio": straggler_ratio(self.bytes_sent),
            "num_components": self.num_components,
            "spectral_gap": self.spectral_gap,
        }

    def subnetwork(self, index: int) -> dict:
        """The figures of one subnetwork, as plain numbers."""
        parameters = {kind: int(held[index]) for kind, held in self.parameters.items()}
        flops = {kind: int(held[index]) for kind, held in self.flops.items()}
        return {
            "subnetwork": index,
            "workers": list(range(index, self.num_workers, self.num_subnetworks)),
            "coverage": float(self.coverage[index]),
            "parameters": {**parameters, "total": sum(parameters.values())},
            "flops_per_token": {**flops, "total": sum(flops.values())},
            "bytes_sent_per_step": float(self.bytes_sent[index]),
        }


def spread(values: np.ndarray) -> dict[str, float]:
    return {"min": values.min().item(), "mean": values.mean().item(), "max": values.max().item()}


def straggler_ratio(values: np.ndarray) -> float:
    """Largest over mean: 1 when all have the same. All wait for the largest."""
    return float(values.max() / values.mean()) if values.any() else 1.0


def plan_figures(
    plan: Plan, model: nn.Module, config: SDPConfig, *, num_workers: int, sequence: int, element_bytes: int
) -> PlanFigures:
    """All figures of a plan; no processes needed.

    Args:
        model: the full model that was planned, on any device (meta included).
        config: for how state is sharded.
        num_workers: a multiple of the plan's N.
        sequence: tokens of a sequence.
        element_bytes: of parameters and gradients on the wire: 4, or 2 in half precision.
    """
    holdings = Holdings.of(plan)
    numel = np.array([m.numel(plan.shapes) for m in plan.modules], dtype=np.int64)
    num_units = np.array([m.num_units for m in plan.modules], dtype=np.int64)
    of_model = flops_of(model, sequence)
    fixed, by_share = module_flops(plan, of_model)
    parameters, full_parameters, flops, full_flops = {}, {}, {}, {}
    for kind in dict.fromkeys(m.kind for m in plan.modules):
        of_kind = np.array([m.kind == kind for m in plan.modules])
        parameters[kind] = holdings.held(np.where(of_kind, numel // num_units, 0))
        full_parameters[kind] = int(numel[of_kind].sum())
        flops[kind] = holdings.held(np.where(of_kind, by_share // num_units, 0)) + fixed[of_kind].sum()
        full_flops[kind] = int((fixed + by_share)[of_kind].sum())
    dealt = np.array([m.layer not in plan.always_held for m in plan.modules])
    of_dealt_unit = np.where(dealt, numel // num_units, 0)
    dealt_elements = of_dealt_unit @ holdings.units
    everyone = np.ones(plan.num_subnetworks, dtype=np.int64)
    parameters[SHARED], full_parameters[SHARED] = everyone * plan.shared_numel, plan.shared_numel
    within = [name for m in plan.modules for name in (m.name, *m.members)]
    full_flops[SHARED] = 3 * of_model.outside(within, structure_of(model).layers).all
    flops[SHARED] = everyone * full_flops[SHARED]
    return PlanFigures(
        num_subnetworks=plan.num_subnetworks,
        num_workers=num_workers,
        sequence=sequence,
        element_bytes=element_bytes,
        parameters=parameters,
        full_parameters=full_parameters,
        flops=flops,
        full_flops=full_flops,
        bytes_sent=bytes_sent(plan, holdings, numel // num_units, config, num_workers, element_bytes),
        coverage=holdings.held(of_dealt_unit) / dealt_elements.sum(),
        unit_holders=np.concatenate(
            [[len(plan.holder_sets[number]) for number in plan.set_of_unit[m.name]] for m in plan.dealt]
        ),
        num_holder_sets=len(plan.holder_sets),
        num_components=len(components(plan.num_subnetworks, holdings.sets_with(dealt_elements > 0))),
        spectral_gap=spectral_gap(holdings, dealt_elements),
    )


def module_flops(plan: Plan, of_model: ModelFlops) -> tuple[np.ndarray, np.ndarray]:
    """FLOPs of forward and backward of each whole maskable module for one token, int64, shape ``(modules,)`` each: what
    every worker computes whatever it holds, and what goes with the share it holds.

    Forward masking: everything goes with the share. Backward masking: only the weight gradients do, a third of what
    products with weights compute.
    """
    whole = np.array([training_flops(module, of_model) for module in plan.modules], dtype=np.int64)
    if plan.masking == "forward":
        return np.zeros_like(whole), whole
    by_share = np.array([forward_flops(module, of_model).of_weights for module in plan.modules], dtype=np.int64)
    return whole - by_share, by_share


def bytes_sent(
    plan: Plan,
    holdings: Holdings,
    unit_numel: np.ndarray,
    config: SDPConfig,
    num_workers: int,
    element_bytes: int,
) -> np.ndarray:
    """Bytes that a worker of each subnetwork sends in one optimizer step, float64, shape ``(N,)``.

    As rings send them, and without FSDP2's padding. It is what :mod:`hf_sdp.engine.traffic` counts.

    Args:
        unit_numel: elements of one unit of each module, shape ``(modules,)``.
    """
    passes = 3 if config.reshard_after_forward else 2  # gather, (gather again,) reduce
    whole_world = sent_in_ring(1, num_workers, passes)
    if plan.masking == "backward":
        return np.full(plan.num_subnetworks, whole_world * plan.full_numel * element_bytes)
    replicas = num_workers // plan.num_subnetworks
    r = holdings.num_holders
    if config.sharding == "none":
        per_element = sent_in_ring(1, r * replicas, BOTH_WAYS)
    else:  # the reduced shard, 1/r, is all-reduced among the replicas
        per_element = sent_in_ring(1, r, passes) + sent_in_ring(1 / r, replicas, BOTH_WAYS)
    per_element = np.where(r == plan.num_subnetworks, whole_world, per_element)
    sent = holdings.members @ (unit_numel @ holdings.units * per_element)
    return element_bytes * (sent + whole_world * plan.shared_numel)
