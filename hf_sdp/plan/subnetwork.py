"""``Subnetwork``: what one worker holds, by the names that its modules and parameters have there.

``model.cut`` makes it of a full model, the engine shards it, and the estimate reads it. None of them decides anything
about it again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from .holders import Holders
from .plan import Part, Plan
from .region import Region
from .units import MaskableModule


@dataclass(frozen=True)
class LocalTensor:
    """What a parameter of a worker is: a region of a full parameter, and who holds it."""

    region: Region
    holders: Holders


@dataclass(frozen=True)
class LocalPart:
    """A part as a worker has it.

    Attributes:
        modules: local names of the modules that it consists of, in forward order, without those that a forward may
            leave out.
        tensors: local parameter name -> what it is.
    """

    part: Part
    modules: tuple[str, ...]
    tensors: dict[str, Region]


class SharedBias(NamedTuple):
    """The bias of a row-wise layer: held by all, while the layer's weight is cut.

    Attributes:
        owner: the layer.
        module: local name of the module that has the bias, as its ``bias``.
        name: full name of the bias.
    """

    owner: str
    module: str
    name: str


@dataclass(frozen=True)
class LocalModule:
    """A maskable module as a worker has it.

    Attributes:
        parts: those that it holds, in global order; none where the module is absent.
        has_parts: whether each module that has tensors of them has modules ``parts.0``, ``parts.1``, ... for them. So
            it is where there are several.
        biases: the shared biases within it.
    """

    module: MaskableModule
    parts: tuple[LocalPart, ...]
    has_parts: bool
    biases: tuple[SharedBias, ...]

    @property
    def units(self) -> list[int]:
        """Numbers of those that are held, in the order in which the worker's tensors have them."""
        return [unit for local in self.parts for unit in local.part.units]


@dataclass(frozen=True)
class Subnetwork:
    """What one worker holds of a plan.

    Attributes:
        modules: the maskable modules that patching changes, in forward order. None under backward masking, and none in
            a simulation: every module keeps its full shape.
    """

    plan: Plan
    modules: tuple[LocalModule, ...]

    @property
    def parts(self) -> Iterator[LocalPart]:
        """In the plan's global order."""
        return (part for module in self.modules for part in module.parts)

    @cached_property
    def tensors(self) -> dict[str, LocalTensor]:
        """Local parameter name -> what it is."""
        plan = self.plan
        result: dict[str, LocalTensor] = {}
        for local in self.parts:
            result |= {name: LocalTensor(region, local.part.holders) for name, region in local.tensors.items()}
        cut = {name for module in self.modules for name in module.module.dims}
        biases = {bias.name: f"{bias.module}.bias" for module in self.modules for bias in module.biases}
        for name, shape in plan.shapes.items():
            if name not in cut:
                result[biases.get(name, name)] = LocalTensor(Region.whole(name, shape), plan.everyone)
        return result

    @cached_property
    def local_names(self) -> dict[str, list[str]]:
        """Full parameter name -> the local parameters that have something of it."""
        result: dict[str, list[str]] = {name: [] for name in self.plan.shapes}
        for local_name, tensor in self.tensors.items():
            result[tensor.region.name].append(local_name)
        return result


def subnetwork_of(plan: Plan, index: int) -> Subnetwork:
    """What subnetwork ``index`` holds, with what is not held absent (forward masking)."""
    held: dict[str, list[Part]] = {}
    for part in plan.held_parts(index):
        held.setdefault(part.module.name, []).append(part)
    return Subnetwork(plan, tuple(_local(plan, module, held.get(module.name, [])) for module in plan.modules))


def whole_model(plan: Plan) -> Subnetwork:
    """The full model: nothing is cut (backward masking, simulation)."""
    return Subnetwork(plan, ())


def _local(plan: Plan, module: MaskableModule, parts: list[Part]) -> LocalModule:
    biases = () if plan.level == "block" else _shared_biases(plan, module)
    # Where others have several parts, and then the biases, so has a worker with one part. Else it would gather its part
    # again in backward before it reduces the bias, and they after it.
    has_parts = len(parts) > 1 or bool(parts) and bool(biases) and module.name in plan.split_modules
    if not has_parts:
        return LocalModule(module, tuple(LocalPart(p, module.members, p.regions) for p in parts), False, biases)
    local = []
    for index, part in enumerate(parts):
        names = {full: owned_by(full, index) for full in part.regions}
        called = (local for full, local in names.items() if full.rpartition(".")[0] not in module.switched)
        owners = dict.fromkeys(name.rpartition(".")[0] for name in called)
        local.append(LocalPart(part, tuple(owners), {names[full]: region for full, region in part.regions.items()}))
    return LocalModule(module, tuple(local), True, biases)


def owned_by(full: str, index: int) -> str:
    """Local name of what the ``index``-th of several parts has of a full parameter or buffer."""
    owner, _, last = full.rpartition(".")
    return f"{owner}.parts.{index}.{last}"


def _shared_biases(plan: Plan, module: MaskableModule) -> tuple[SharedBias, ...]:
    """Of the layers whose weight is cut and whose bias is not (row-wise layers)."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in module.dims if name.endswith(".weight"))
    biases = ((owner, f"{owner}.bias") for owner in owners)
    return tuple(
        SharedBias(owner, f"{owner}.shared_bias", bias)
        for owner, bias in biases
        if bias in plan.shapes and bias not in module.dims
    )
