"""What is sharded and communicated together, by formula: the groups that FSDP2 and the SDP engine make of a model.

Follows ``hf_sdp.engine.shard._sharding_groups`` and ``placement.shard_box``, without a model of full depth; a test compares.
"""

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from transformers import PretrainedConfig

from ..families import family_of
from ..families.meta_model import meta_model
from ..plan.plan import Plan
from ..plan.units import decoder_layers
from .trace import Shape, is_sum, shallow_config, shared_biases


@dataclass(frozen=True)
class Group:
    """Parameters that one all-gather collects and one reduce-scatter reduces.

    Attributes:
        modules: local names, in forward order.
        shapes: local parameter name -> shape of what is gathered.
        members: workers among whom they are sharded.
        replicas: copies of that sharding, among which gradients are all-reduced.
        index: this worker's place among the members.
    """

    modules: tuple[str, ...]
    shapes: dict[str, Shape]
    members: int
    replicas: int
    index: int

    @cached_property
    def stored_numel(self) -> int:
        """Elements this worker stores: its rows of every parameter, as torch.chunk cuts them."""
        total = 0
        for shape in self.shapes.values():
            step = -(-shape[0] // self.members)
            rows = min((self.index + 1) * step, shape[0]) - min(self.index * step, shape[0])
            total += rows * math.prod(shape[1:])
        return total

    @cached_property
    def shard_numel(self) -> int:
        """Elements of a shard with its padding: what collectives send."""
        return sum(-(-shape[0] // self.members) * math.prod(shape[1:]) for shape in self.shapes.values())

    @property
    def gathered_numel(self) -> int:
        return self.members * self.shard_numel

    @cached_property
    def largest_numel(self) -> int:
        return max(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class Skeleton:
    """Names and shapes of a model of any depth.

    Attributes:
        layers: name of the list of decoder layers; num_layers: how many there are.
        layer_shapes: parameter name relative to its layer -> shape. other_shapes: full name -> shape, of the others.
        embeddings, head: module names; head is None when there is none. tied: whether they share a weight.
        norms: name of a block's module -> that of its norm, relative to the layer.
    """

    layers: str
    num_layers: int
    layer_shapes: dict[str, Shape]
    other_shapes: dict[str, Shape]
    embeddings: str
    head: str | None
    tied: bool
    norms: dict[str, str]

    def shapes_of_layer(self, layer: int) -> dict[str, Shape]:
        return {f"{self.layers}.{layer}.{name}": shape for name, shape in self.layer_shapes.items()}

    @property
    def shapes(self) -> dict[str, Shape]:
        """Full parameter name -> shape."""
        result = dict(self.other_shapes)
        for layer in range(self.num_layers):
            result |= self.shapes_of_layer(layer)
        return result


def skeleton(model_config: PretrainedConfig) -> Skeleton:
    """Raises: SDPConfigError when the family is unknown."""
    return _skeleton(json.dumps(model_config.to_dict(), sort_keys=True, default=str), _Hidden(model_config))


class _Hidden:
    """Not part of the key of a cache."""

    def __init__(self, value):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _Hidden)

    def __hash__(self):
        return 0


@functools.lru_cache(maxsize=8)
def _skeleton(key: str, hidden: _Hidden) -> Skeleton:
    model_config = hidden.value
    family = family_of(model_config)
    model = meta_model(shallow_config(model_config))
    layers, _ = decoder_layers(model, family)
    names = {module: name for name, module in model.named_modules()}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    first = f"{layers}.0."
    return Skeleton(
        layers=layers,
        num_layers=model_config.num_hidden_layers,
        layer_shapes={n.removeprefix(first): s for n, s in shapes.items() if n.startswith(first)},
        other_shapes={n: s for n, s in shapes.items() if not n.startswith(layers + ".")},
        embeddings=names[embeddings],
        head=None if head is None else names[head],
        tied=head is not None and head.weight is embeddings.weight,
        norms={block.module: block.norm for block in family.blocks},
    )


def fsdp_groups(shape_of: Skeleton, world_size: int, rank: int = 0) -> list[Group]:
    """Plain FSDP2: one group for each decoder layer, the root with all else."""
    layers = [
        Group((f"{shape_of.layers}.{i}",), shape_of.shapes_of_layer(i), world_size, 1, rank)
        for i in range(shape_of.num_layers)
    ]
    return [*layers, Group(("",), shape_of.other_shapes, world_size, 1, rank)]


def sdp_groups(plan: Plan, subnetwork: int, shape_of: Skeleton, world_size: int, sharding: str) -> list[Group]:
    """The groups of worker ``subnetwork`` (of the first replica), the root last."""
    num_replicas = world_size // plan.num_subnetworks
    everyone = plan.everyone

    def group(modules: Iterable[str], shapes: dict[str, Shape], holders=everyone) -> Group:
        if sharding == "none":
            members, replicas, index = 1, len(holders) * num_replicas, 0
        elif holders == everyone:
            members, replicas, index = world_size, 1, subnetwork
        else:
            members, replicas, index = len(holders), num_replicas, holders.index(subnetwork)
        return Group(tuple(modules), shapes, members, replicas, index)

    groups, claimed = [], set()
    is_full = all(holders == everyone for units in plan.unit_holders.values() for holders in units)
    local, biases = _local_parameters(plan, subnetwork)
    for module, shapes in biases.items():
        groups.append(group([module], shapes))
    if plan.masking == "forward" and not is_full:
        by_layer: dict[tuple, tuple[list[str], dict[str, Shape]]] = {}
        for part, module, shapes in local:
            modules, its_shapes = by_layer.setdefault((part.layer, part.holders), ([], {}))
            norm = shape_of.norms.get(module.rpartition(".")[2])
            if plan.level == "block" and part.kind != "layer":
                modules.append(f"{module.rpartition('.')[0]}.{norm}")
            modules.append(module)
            its_shapes |= shapes
        for (_, holders), (modules, shapes) in by_layer.items():
            groups.append(group(modules, shapes, holders))
        for module in plan.modules:
            claimed |= set(module.dims)
    else:
        for layer in range(shape_of.num_layers):
            shapes = shape_of.shapes_of_layer(layer)
            claimed |= set(shapes)
            prefix = f"{shape_of.layers}.{layer}."
            parts = [(m, s) for _, m, s in local if m.startswith(prefix)]
            if plan.masking == "forward" and parts:  # the same shapes, under the names they have after patching
                cut = {name for m in plan.modules if m.layer == layer for name in m.dims}
                shapes = {n: s for n, s in shapes.items() if n not in cut}
                for _, its_shapes in parts:
                    shapes |= its_shapes
            groups.append(group([f"{shape_of.layers}.{layer}"], _without_biases(shapes, biases)))
    outside = {name: shape for name, shape in shape_of.other_shapes.items()}
    for layer in range(shape_of.num_layers):
        outside |= {name: shape for name, shape in shape_of.shapes_of_layer(layer).items() if name not in claimed}
    outside = _without_biases(outside, biases)
    heads = [name for name in (shape_of.embeddings, shape_of.head) if name is not None]
    for modules in [heads] if shape_of.tied else [[name] for name in heads]:
        own = {n: s for n, s in outside.items() if n.rpartition(".")[0] in modules}
        outside = {n: s for n, s in outside.items() if n not in own}
        groups.append(group(modules, own))
    return [*groups, group([""], outside)]


def _without_biases(shapes: dict[str, Shape], biases: dict[str, dict[str, Shape]]) -> dict[str, Shape]:
    if not biases:
        return shapes
    full = {name.replace(".shared_bias.", ".") for its in biases.values() for name in its}
    full |= {name.replace(".shared_biases.", ".") for its in biases.values() for name in its}
    return {name: shape for name, shape in shapes.items() if name not in full}


def _local_parameters(plan: Plan, subnetwork: int):
    """The parts a subnetwork holds, as ``(part, local module name, local parameter name -> shape)``, and the shared biases
    of row-wise layers: module name -> the same. Names as ``patch_model`` makes them."""
    held: dict[str, list] = {}
    for part in plan.held_parts(subnetwork):
        held.setdefault(part.module, []).append(part)
    local, biases = [], {}
    cut_by_patch = plan.masking == "forward" and plan.level == "neuron"
    for maskable in plan.modules:
        name, parts = maskable.name, held.get(maskable.name, [])
        is_a_sum = cut_by_patch and is_sum(plan, maskable, len(parts))
        for index, part in enumerate(parts):
            module = f"{name}.parts.{index}" if is_a_sum else name
            shapes = {}
            for full, (dim, start, stop) in part.ranges.items():
                shape = list(plan.shapes[full])
                shape[dim] = stop - start
                shapes[module + full.removeprefix(name) if cut_by_patch else full] = tuple(shape)
            local.append((part, module, shapes))
        for child, shape in shared_biases(plan, maskable).items():
            owner = f"{name}.shared_biases.{child}" if is_a_sum else f"{name}.{child}.shared_bias"
            biases[owner] = {f"{owner}.bias": shape}
    return local, biases
