"""``Plan``: which subnetworks hold which slices of which full parameters. Plain data, the same on every worker."""

import copy
import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import torch
from torch import nn

from .config import SDPConfig
from .deal import deal, reduced, replication, worker_graph
from .errors import SDPConfigError
from .units import MaskableModule, maskable_modules

Holders = tuple[int, ...]
"""Subnetworks, sorted."""


@dataclass(frozen=True)
class Slice:
    """Range ``start:stop`` along ``dim`` of one full parameter. ``unit`` is None for a shared parameter."""

    dim: int
    start: int
    stop: int
    unit: str | None
    holders: Holders


@dataclass(frozen=True)
class Part:
    """All slices of one module with one holder set: what is sharded and synced together.

    ``ranges``: full parameter name -> ``(dim, start, stop)``, one contiguous range each.
    """

    module: str
    kind: str
    layer: int
    holders: Holders
    ranges: dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Plan:
    """Unit -> holders for a whole model. Build it with :func:`make_plan`.

    Attributes:
        level, masking: as in ``SDPConfig``.
        num_subnetworks: N.
        replication: r, the number of subnetworks that hold each unit.
        shapes: full parameter name -> shape, in the order of ``named_parameters()`` (tied parameters once).
        modules: the maskable modules, in forward order.
        unit_holders: module name -> the holders of each of its units.
    """

    level: str
    masking: str
    num_subnetworks: int
    replication: int
    shapes: dict[str, tuple[int, ...]]
    modules: tuple[MaskableModule, ...]
    unit_holders: dict[str, tuple[Holders, ...]]

    @property
    def everyone(self) -> Holders:
        return tuple(range(self.num_subnetworks))

    @cached_property
    def slices(self) -> dict[str, tuple[Slice, ...]]:
        """Full parameter name -> its slices, which tile it along one dim. Shared parameters have one."""
        cut = {name: (module, dim) for module in self.modules for name, dim in module.dims.items()}
        result = {}
        for name, shape in self.shapes.items():
            if name not in cut:
                result[name] = (Slice(0, 0, shape[0] if shape else 1, None, self.everyone),)
                continue
            module, dim = cut[name]
            step = shape[dim] // module.num_units
            result[name] = tuple(
                Slice(dim, unit * step, (unit + 1) * step, f"{module.name}[{unit}]", holders)
                for unit, holders in enumerate(self.unit_holders[module.name])
            )
        return result

    def held(self, subnetwork: int) -> dict[str, tuple[Slice, ...]]:
        """The slices that ``subnetwork`` holds; parameters of which it holds nothing are left out."""
        self._check(subnetwork)
        held = {n: tuple(s for s in slices if subnetwork in s.holders) for n, slices in self.slices.items()}
        return {name: slices for name, slices in held.items() if slices}

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """All parts of the model in the one global order of communication: forward order of modules, sorted
        holder sets within a module. Every worker runs the ones it holds in this order (backward: in reverse)."""
        result = []
        for module in self.modules:
            runs: list[tuple[Holders, int, int]] = []
            for unit, holders in enumerate(self.unit_holders[module.name]):
                if runs and runs[-1][0] == holders:
                    runs[-1] = (holders, runs[-1][1], unit + 1)
                else:
                    runs.append((holders, unit, unit + 1))
            for holders, first, last in sorted(runs):
                ranges = {}
                for name, dim in module.dims.items():
                    step = self.shapes[name][dim] // module.num_units
                    ranges[name] = (dim, first * step, last * step)
                result.append(Part(module.name, module.kind, module.layer, holders, ranges))
        return tuple(result)

    def held_parts(self, subnetwork: int) -> tuple[Part, ...]:
        """The parts that ``subnetwork`` holds, in global order."""
        self._check(subnetwork)
        return tuple(part for part in self.parts if subnetwork in part.holders)

    @cached_property
    def holder_sets(self) -> tuple[Holders, ...]:
        """All distinct holder sets, sorted; that of the shared parameters (everyone) is one of them."""
        return tuple(sorted({self.everyone, *(h for holders in self.unit_holders.values() for h in holders)}))

    @property
    def coverage(self) -> float:
        """Share of the maskable elements that a worker holds (mean over subnetworks): r/N."""
        return self.replication / self.num_subnetworks

    def numel(self, subnetwork: int, kind: str | None = None) -> int:
        """Elements that ``subnetwork`` holds: of modules of ``kind``, or of everything."""
        parts = [p for p in self.held_parts(subnetwork) if kind in (None, p.kind)]
        maskable = sum(
            math.prod(self.shapes[n]) // self.shapes[n][dim] * (stop - start)
            for part in parts
            for n, (dim, start, stop) in part.ranges.items()
        )
        return maskable + (self.shared_numel if kind is None else 0)

    @cached_property
    def shared_numel(self) -> int:
        return sum(math.prod(self.shapes[n]) for n, slices in self.slices.items() if slices[0].unit is None)

    @cached_property
    def full_numel(self) -> int:
        """Elements of the full model (tied parameters once)."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def _check(self, subnetwork: int):
        if not 0 <= subnetwork < self.num_subnetworks:
            raise SDPConfigError(f"subnetwork must be in 0..{self.num_subnetworks - 1}, got {subnetwork}.")

    def to_json(self) -> str:
        """Canonical JSON; ``Plan.from_json(plan.to_json()) == plan``."""
        index = {holders: i for i, holders in enumerate(self.holder_sets)}
        data = {
            "level": self.level,
            "masking": self.masking,
            "num_subnetworks": self.num_subnetworks,
            "replication": self.replication,
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "holder_sets": [list(holders) for holders in self.holder_sets],
            "modules": [
                {**dataclasses.asdict(m), "holder_set_of_unit": [index[h] for h in self.unit_holders[m.name]]}
                for m in self.modules
            ],
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        data = json.loads(text)
        sets = [tuple(holders) for holders in data["holder_sets"]]
        unit_holders = {m["name"]: tuple(sets[i] for i in m.pop("holder_set_of_unit")) for m in data["modules"]}
        return cls(
            level=data["level"],
            masking=data["masking"],
            num_subnetworks=data["num_subnetworks"],
            replication=data["replication"],
            shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
            modules=tuple(MaskableModule(**m) for m in data["modules"]),
            unit_holders=unit_holders,
        )

    @property
    def hash(self) -> str:
        """SHA-256 of :meth:`to_json`, hexadecimal: equal on all workers, processes and machines."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def make_plan(model_or_config, config: SDPConfig, num_subnetworks: int) -> Plan:
    """Deal the units of a model to subnetworks: a pure function of (shapes, config, N), no processes needed.

    All subnetworks hold the same number of bytes of each kind (attention, MLP) within one unit, every unit is held
    by exactly ``r = coverage * num_subnetworks`` of them, and when r >= 2 the worker graph is connected.

    Args:
        model_or_config: a transformers model that is not patched yet, or its config (built on the meta device).
        num_subnetworks: N.
    Raises: SDPConfigError when the family is unknown, nothing matches, or the coverage cannot be met; the message
        names the nearest coverage that can.
    """
    model = model_or_config if isinstance(model_or_config, nn.Module) else meta_model(model_or_config)
    r = replication(config.coverage, num_subnetworks)
    m, k = reduced(r, num_subnetworks)
    modules = maskable_modules(
        model,
        level=config.level,
        block_granularity=config.block_granularity,
        chunks=k if config.level == "neuron" else 1,
    )
    stacks: dict[tuple[str, int], list[MaskableModule]] = {}
    for module in modules:
        stacks.setdefault((module.kind, module.num_units), []).append(module)
    kinds = list(dict.fromkeys(kind for kind, _ in stacks))
    unit_holders: dict[str, tuple[Holders, ...]] = {}
    for (kind, num_units), stack in stacks.items():
        _check_every_worker_gets_some(config, kind, num_units, len(stack), r, num_subnetworks)
        dealt = deal(
            num_units=num_units,
            depth=len(stack),
            kind_index=kinds.index(kind),
            num_subnetworks=num_subnetworks,
            r=r,
            seed=config.seed,
        )
        unit_holders.update({module.name: tuple(holders) for module, holders in zip(stack, dealt, strict=True)})
    graph = worker_graph(holders for module in unit_holders.values() for holders in module)
    if r >= 2 and not nx.is_connected(graph):
        groups = [sorted(c) for c in nx.connected_components(graph)]
        raise SDPConfigError(
            f"{len(modules)} maskable modules are too few to connect {num_subnetworks} subnetworks at coverage "
            f"{config.coverage:g}: {groups} would share no unit and drift apart. Use a higher coverage, fewer "
            "subnetworks (num_subnetworks), or level='neuron'."
        )
    return Plan(
        level=config.level,
        masking=config.masking,
        num_subnetworks=num_subnetworks,
        replication=r,
        shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        modules=tuple(modules),
        unit_holders={module.name: unit_holders[module.name] for module in modules},
    )


def _check_every_worker_gets_some(config, kind: str, num_units: int, depth: int, r: int, num_subnetworks: int):
    """At neuron level something of every module (no empty layers), at block level one block of every kind."""
    units = num_units if config.level == "neuron" else depth
    if units * r >= num_subnetworks:
        return
    nearest = math.ceil(num_subnetworks / units) / num_subnetworks
    what = f"{units} key/value heads" if kind == "attention" and config.level == "neuron" else f"{units} {kind} units"
    remedy = (
        f"Nearest coverage that can be met: {nearest:g}." if nearest <= 1 else "No coverage of this model can be met."
    )
    raise SDPConfigError(
        f"coverage={config.coverage:g} of {what} is less than one unit per worker ({num_subnetworks} subnetworks). {remedy}"
    )


def meta_model(model_config) -> nn.Module:
    """The full model of a transformers config on the meta device: shapes without memory."""
    import transformers

    architecture = (getattr(model_config, "architectures", None) or [None])[0]
    model_class = getattr(transformers, architecture, None) if architecture else None
    with torch.device("meta"):
        if model_class is not None:
            return model_class(copy.deepcopy(model_config))
        return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(model_config))
