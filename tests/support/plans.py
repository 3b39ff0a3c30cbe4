"""Plans made by hand, and plans unit by unit."""

import math

from hf_sdp import SDPConfig, make_plan
from hf_sdp.plan.plan import Plan
from tests.support.models import tiny_config


def units_of(plan: Plan):
    """``(module, holders, elements, weights of linear layers)`` of every unit."""
    for module in plan.modules:
        for index, holders in enumerate(plan.unit_holders[module.name]):
            sizes = [math.prod(plan.shapes[name]) // module.num_units for name in module.dims]
            weights = [s for s, name in zip(sizes, module.dims, strict=True) if name.endswith("proj.weight")]
            yield module, index, holders, sum(sizes), sum(weights)


def hand_made(num_subnetworks: int, *holders: tuple[int, ...]) -> Plan:
    """Layer i is held by ``holders[i]``."""
    plan = make_plan(
        tiny_config(num_hidden_layers=len(holders)),
        SDPConfig(level="block", coverage=1.0, block_granularity="layer"),
        2,
    )
    units = {module.name: (h,) for module, h in zip(plan.modules, holders, strict=True)}
    return Plan.of_units(
        level=plan.level, masking=plan.masking, always_held=(), shapes=plan.shapes, modules=plan.modules,
        num_subnetworks=num_subnetworks, unit_holders=units,
    )  # fmt: skip
