"""``Plan``: which subnetworks hold which slices of which full parameters. Plain data, the same on every worker."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import SDPConfigError
from .holders import Holders, numbered
from .region import Region, Shape
from .units import MaskableModule


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

    Attributes:
        module: the maskable module that it is a part of.
        holder_set: index of its holder set in ``Plan.holder_sets``; ``holders``: the set.
        units: numbers of those that it consists of.
        regions: full name of a parameter or buffer -> what the part is of it.
    """

    module: MaskableModule
    holder_set: int
    holders: Holders
    units: range
    regions: dict[str, Region]

    @property
    def numel(self) -> int:
        return sum(region.numel for region in self.regions.values())


@dataclass(frozen=True)
class Plan:
    """Unit -> holders for a whole model. Build it with :func:`hf_sdp.make_plan`.

    Attributes:
        level, masking: as in ``SDPConfig``.
        num_subnetworks: N.
        always_held: layers whose modules are not dealt: every subnetwork holds them.
        shapes: full parameter name -> shape, in the order of ``named_parameters()`` (tied parameters once).
        modules: the maskable modules, in forward order.
        holder_sets: all distinct holder sets, sorted. That of the shared parameters (everyone) is one of them.
        set_of_unit: module name -> for each of its units the index of its holder set.
    """

    level: str
    masking: str
    num_subnetworks: int
    always_held: tuple[int, ...]
    shapes: dict[str, Shape]
    modules: tuple[MaskableModule, ...]
    holder_sets: tuple[Holders, ...]
    set_of_unit: dict[str, tuple[int, ...]]

    @classmethod
    def of_units(cls, *, num_subnetworks: int, unit_holders: Mapping[str, Sequence[Holders]], **fields) -> "Plan":
        """The plan in which module name -> holders of each of its units is ``unit_holders``."""
        sets, set_of_unit = numbered(unit_holders, always=[tuple(range(num_subnetworks))])
        return cls(num_subnetworks=num_subnetworks, holder_sets=sets, set_of_unit=set_of_unit, **fields)

    @property
    def everyone(self) -> Holders:
        return tuple(range(self.num_subnetworks))

    @cached_property
    def unit_holders(self) -> dict[str, tuple[Holders, ...]]:
        """Module name -> the holders of each of its units."""
        return {name: tuple(self.holder_sets[i] for i in units) for name, units in self.set_of_unit.items()}

    @cached_property
    def cut(self) -> dict[str, MaskableModule]:
        """Full name of every tensor that is cut -> its module."""
        return {name: module for module in self.modules for name in module.dims}

    @cached_property
    def slices(self) -> dict[str, tuple[Slice, ...]]:
        """Full parameter name -> its slices, which tile it along one dim. Shared parameters have one.

        A unit has several slices of a fused projection.
        """
        return {name: tuple(s for s, _ in numbered_slices) for name, numbered_slices in self._slices.items()}

    @cached_property
    def _slices(self) -> dict[str, tuple[tuple[Slice, int], ...]]:
        """The same, each slice with the index of its holder set."""
        result: dict[str, tuple[tuple[Slice, int], ...]] = {}
        everyone = self.everyone
        shared = self.holder_sets.index(everyone)
        for name, shape in self.shapes.items():
            module = self.cut.get(name)
            if module is None:
                result[name] = ((Slice(0, 0, shape[0] if shape else 1, None, everyone), shared),)
                continue
            dim, found = module.dims[name], []
            for unit, number in enumerate(self.set_of_unit[module.name]):
                for start, stop in module.region(name, shape, unit, unit + 1).ranges[dim]:
                    holders = self.holder_sets[number]
                    found.append((Slice(dim, start, stop, f"{module.name}[{unit}]", holders), number))
            result[name] = tuple(sorted(found, key=lambda pair: pair[0].start))
        return result

    def is_shared(self, module: MaskableModule) -> bool:
        """Whether every subnetwork holds all of it."""
        return all(self.holder_sets[number] == self.everyone for number in self.set_of_unit[module.name])

    def holds(self, subnetwork: int) -> tuple[bool, ...]:
        """For each holder set whether ``subnetwork`` is in it."""
        if not 0 <= subnetwork < self.num_subnetworks:
            raise SDPConfigError(f"subnetwork must be in 0..{self.num_subnetworks - 1}, got {subnetwork}.")
        return tuple(subnetwork in holders for holders in self.holder_sets)

    def held(self, subnetwork: int) -> dict[str, tuple[Slice, ...]]:
        """The slices that ``subnetwork`` holds; parameters of which it holds nothing are left out."""
        holds = self.holds(subnetwork)
        held = {name: tuple(s for s, number in slices if holds[number]) for name, slices in self._slices.items()}
        return {name: slices for name, slices in held.items() if slices}

    def held_region(self, name: str, subnetwork: int) -> Region:
        """What ``subnetwork`` holds of a full parameter: all its slices, put together in their order."""
        slices, shape = self.held(subnetwork)[name], self.shapes[name]
        ranges = list(Region.whole(name, shape).ranges)
        if shape:
            ranges[slices[0].dim] = tuple((s.start, s.stop) for s in slices)
        return Region(name, tuple(ranges))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """All parts of the model in the one global order of communication.

        It is the forward order of modules, and that of sorted holder sets within a module. Every worker runs the ones
        that it holds in this order, and backward in reverse.
        """
        result = []
        for module in self.modules:
            for number, first, last in sorted(self.runs(module)):
                regions = {name: module.region(name, self.shapes[name], first, last) for name in module.dims}
                result.append(Part(module, number, self.holder_sets[number], range(first, last), regions))
        return tuple(result)

    def runs(self, module: MaskableModule) -> list[tuple[int, int, int]]:
        """``(holder set, first unit, last unit + 1)`` of neighbouring units with one holder set, in order of units."""
        found: list[tuple[int, int, int]] = []
        for unit, number in enumerate(self.set_of_unit[module.name]):
            if found and found[-1][0] == number:
                found[-1] = (number, found[-1][1], unit + 1)
            else:
                found.append((number, unit, unit + 1))
        return found

    def held_runs(self, module: MaskableModule, subnetwork: int) -> list[tuple[int, int, float]]:
        """``(first unit, last unit + 1, N/r)`` of what ``subnetwork`` holds, with neighbours of one N/r joined."""
        holds = self.holds(subnetwork)
        found: list[tuple[int, int, float]] = []
        for number, first, last in self.runs(module):
            if not holds[number]:
                continue
            scale = self.gradient_scale(self.holder_sets[number])
            if found and found[-1][1:] == (first, scale):
                found[-1] = (found[-1][0], last, scale)
            else:
                found.append((first, last, scale))
        return found

    def held_units(self, module: MaskableModule, subnetwork: int) -> list[int]:
        """Numbers of the units of a module that ``subnetwork`` holds, in order."""
        return [unit for first, last, _ in self.held_runs(module, subnetwork) for unit in range(first, last)]

    @cached_property
    def split_modules(self) -> frozenset[str]:
        """Modules of which some subnetwork holds several parts, and so computes their sum."""
        return frozenset(module.name for module in self.modules if self._is_split(module))

    def _is_split(self, module: MaskableModule) -> bool:
        holders = [self.holder_sets[number] for number, _, _ in self.runs(module)]
        return sum(map(len, holders)) > len(set().union(*holders))

    def held_parts(self, subnetwork: int) -> tuple[Part, ...]:
        """The parts that ``subnetwork`` holds, in global order."""
        holds = self.holds(subnetwork)
        return tuple(part for part in self.parts if holds[part.holder_set])

    @property
    def dealt(self) -> tuple[MaskableModule, ...]:
        """The modules that coverage is of: those of layers that are not always held."""
        return tuple(module for module in self.modules if module.layer not in self.always_held)

    def coverage_of(self, subnetwork: int) -> float:
        """Share of the maskable elements that ``subnetwork`` holds. Layers that are always held do not count."""
        holds = self.holds(subnetwork)
        return self._share(lambda number: holds[number])

    @property
    def coverage(self) -> float:
        """Share of the maskable elements that a worker holds, mean over subnetworks."""
        return self._share(lambda number: len(self.holder_sets[number])) / self.num_subnetworks

    def _share(self, weight) -> float:
        """Of the elements that are dealt, each weighed by that of the number of its holder set."""
        held = total = 0
        for module in self.dealt:
            numel = module.numel(self.shapes) // module.num_units
            held += numel * sum(map(weight, self.set_of_unit[module.name]))
            total += numel * module.num_units
        return held / total

    @cached_property
    def replication(self) -> tuple[int, int]:
        """Fewest and most holders of a unit; layers that are always held do not count."""
        used = {number for module in self.dealt for number in self.set_of_unit[module.name]}
        counts = [len(self.holder_sets[number]) for number in used]
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
        held = sum(part.numel for part in self.held_parts(subnetwork) if kind in (None, part.module.kind))
        return held + (self.shared_numel if kind is None else 0)

    @cached_property
    def shared_numel(self) -> int:
        return sum(math.prod(shape) for name, shape in self.shapes.items() if name not in self.cut)

    @cached_property
    def full_numel(self) -> int:
        """Elements of the full model (tied parameters once)."""
        return sum(math.prod(shape) for shape in self.shapes.values())

    def to_json(self) -> str:
        """Canonical JSON; ``Plan.from_json(plan.to_json()) == plan``."""
        modules = []
        for module in self.modules:
            entry = dataclasses.asdict(module)
            default = vars(dataclasses.replace(module, packed={}, members=(), sizes={}, arguments={}, switched=()))
            for name in ("packed", "members", "sizes", "arguments", "switched"):
                if entry[name] == default[name]:
                    del entry[name]  # as without it
            modules.append({**entry, "holder_set_of_unit": list(self.set_of_unit[module.name])})
        data = {
            "level": self.level,
            "masking": self.masking,
            "num_subnetworks": self.num_subnetworks,
            "always_held": list(self.always_held),
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "holder_sets": [list(holders) for holders in self.holder_sets],
            "modules": modules,
        }
        return json.dumps(data, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        data = json.loads(text)
        set_of_unit = {m["name"]: tuple(m.pop("holder_set_of_unit")) for m in data["modules"]}
        for module in data["modules"]:
            packed = module.get("packed", {})
            module["sizes"] = {name: tuple(attributes) for name, attributes in module.get("sizes", {}).items()}
            module["arguments"] = {
                name: {argument: tuple(of_heads) for argument, of_heads in arguments.items()}
                for name, arguments in module.get("arguments", {}).items()
            }
            module["members"] = tuple(module.get("members", ()))
            module["switched"] = tuple(module.get("switched", ()))
            module["packed"] = {name: tuple(map(tuple, ranges)) for name, ranges in packed.items()}
        return cls(
            level=data["level"],
            masking=data["masking"],
            num_subnetworks=data["num_subnetworks"],
            always_held=tuple(data.get("always_held", ())),
            shapes={name: tuple(shape) for name, shape in data["shapes"].items()},
            modules=tuple(MaskableModule(**module) for module in data["modules"]),
            holder_sets=tuple(map(tuple, data["holder_sets"])),
            set_of_unit=set_of_unit,
        )

    @property
    def hash(self) -> str:
        """SHA-256 of :meth:`to_json`, hexadecimal: equal on all workers, processes and machines."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()
