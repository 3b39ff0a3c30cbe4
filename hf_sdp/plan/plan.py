"""``Plan``: which subnetworks hold which slices of which full parameters. Plain data, the same on every worker."""

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from functools import cached_property

from ..errors import SDPConfigError
from .units import MaskableModule

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
    """Unit -> holders for a whole model. Build it with :func:`hf_sdp.make_plan`.

    Attributes:
        level, masking: as in ``SDPConfig``.
        num_subnetworks: N.
        always_held: layers whose modules are not dealt: every subnetwork holds them.
        shapes: full parameter name -> shape, in the order of ``named_parameters()`` (tied parameters once).
        modules: the maskable modules, in forward order.
        unit_holders: module name -> the holders of each of its units.
    """

    level: str
    masking: str
    num_subnetworks: int
    always_held: tuple[int, ...]
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
        everyone = self.everyone
        result = {}
        for name, shape in self.shapes.items():
            if name not in cut:
                result[name] = (Slice(0, 0, shape[0] if shape else 1, None, everyone),)
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
        holds = {id(h): subnetwork in h for h in self._distinct_holders()}
        held = {
            name: tuple(s for s in slices if s.unit is None or holds[id(s.holders)])
            for name, slices in self.slices.items()
        }
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

    @cached_property
    def split_modules(self) -> frozenset[str]:
        """Modules of which some subnetwork holds several parts, and so computes their sum."""
        holders: dict[str, list[int]] = {}
        for part in self.parts:
            holders.setdefault(part.module, []).extend(part.holders)
        return frozenset(name for name, of_parts in holders.items() if len(of_parts) > len(set(of_parts)))

    def held_parts(self, subnetwork: int) -> tuple[Part, ...]:
        """The parts that ``subnetwork`` holds, in global order."""
        self._check(subnetwork)
        return tuple(part for part in self.parts if subnetwork in part.holders)

    @cached_property
    def holder_sets(self) -> tuple[Holders, ...]:
        """All distinct holder sets, sorted; that of the shared parameters (everyone) is one of them."""
        return tuple(sorted({self.everyone, *self._distinct_holders()}))

    def _distinct_holders(self) -> list[Holders]:
        """The holder sets of units. Units share tuples, which are told apart by identity: to hash or to search one for each
        unit would take seconds when thousands of subnetworks hold it."""
        return list({id(h): h for holders in self.unit_holders.values() for h in holders}.values())

    @property
    def coverage(self) -> float:
        """Share of the maskable elements that a worker holds, mean over subnetworks."""
        dealt = [part for part in self.parts if part.layer not in self.always_held]
        held = sum(self._part_numel(part) * len(part.holders) for part in dealt)
        return held / sum(map(self._part_numel, dealt)) / self.num_subnetworks

    def coverage_of(self, subnetwork: int) -> float:
        """Share of the maskable elements that ``subnetwork`` holds. Layers that are always held do not count."""
        dealt = [part for part in self.parts if part.layer not in self.always_held]
        held = sum(self._part_numel(part) for part in dealt if subnetwork in part.holders)
        return held / sum(map(self._part_numel, dealt))

    @cached_property
    def replication(self) -> tuple[int, int]:
        """Fewest and most holders of a unit; layers that are always held do not count."""
        counts = {
            len(holders)
            for m in self.modules
            if m.layer not in self.always_held
            for holders in self.unit_holders[m.name]
        }
        return min(counts), max(counts)

    def gradient_scale(self, holders: Holders) -> float:
        """N/r: makes of a mean over N subnetworks, to which r contribute, the mean over those that hold."""
        return self.num_subnetworks / len(holders)

    @property
    def is_full(self) -> bool:
        """Whether every subnetwork is the full model."""
        return self.replication[0] == self.num_subnetworks

    def numel(self, subnetwork: int, kind: str | None = None) -> int:
        """Elements that ``subnetwork`` holds: of modules of ``kind``, or of everything."""
        parts = [p for p in self.held_parts(subnetwork) if kind in (None, p.kind)]
        return sum(map(self._part_numel, parts)) + (self.shared_numel if kind is None else 0)

    def _part_numel(self, part: Part) -> int:
        return sum(
            math.prod(self.shapes[n]) // self.shapes[n][dim] * (stop - start)
            for n, (dim, start, stop) in part.ranges.items()
        )

    @cached_property
    def shared_numel(self) -> int:
        cut = {name for module in self.modules for name in module.dims}
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name not in cut)

    @cached_property
    def full_numel(self) -> int:
        """Elements of the full model (tied parameters once)."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def _check(self, subnetwork: int):
        if not 0 <= subnetwork < self.num_subnetworks:
            raise SDPConfigError(f"subnetwork must be in 0..{self.num_subnetworks - 1}, got {subnetwork}.")

    def to_json(self) -> str:
        """Canonical JSON; ``Plan.from_json(plan.to_json()) == plan``."""
        position = {holders: i for i, holders in enumerate(self.holder_sets)}
        index = {id(holders): position[holders] for holders in self._distinct_holders()}
        data = {
            "level": self.level,
            "masking": self.masking,
            "num_subnetworks": self.num_subnetworks,
            "always_held": list(self.always_held),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "holder_sets": [list(holders) for holders in self.holder_sets],
            "modules": [
                {**dataclasses.asdict(m), "holder_set_of_unit": [index[id(h)] for h in self.unit_holders[m.name]]}
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
            always_held=tuple(data.get("always_held", ())),
            shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
            modules=tuple(MaskableModule(**m) for m in data["modules"]),
            unit_holders=unit_holders,
        )

    @property
    def hash(self) -> str:
        """SHA-256 of :meth:`to_json`, hexadecimal: equal on all workers, processes and machines."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()
