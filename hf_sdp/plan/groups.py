"""What is sharded together, and in which order: the groups that one all-gather collects and one reduce-scatter reduces.

The engine calls ``fully_shard`` on each of them, bottom-up; the estimate counts their bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..families import Structure
from .holders import Holders
from .region import Region, Shape
from .subnetwork import LocalTensor, Subnetwork

ROOT = ""
"""Name of the model itself."""


@dataclass(frozen=True)
class Group:
    """Modules whose parameters are sharded together.

    Attributes:
        modules: local names, in forward order.
        holders: among whose workers they are sharded.
        tensors: local parameter name -> what is gathered.
    """

    modules: tuple[str, ...]
    holders: Holders
    tensors: dict[str, Region]


def sharding_groups(subnetwork: Subnetwork, structure: Structure) -> list[Group]:
    """The groups of a worker, bottom-up; the root, with all that is left (norms at neuron level), is the last.

    The parts of one layer with the same holder set share their collectives, and so do the embeddings with a tied head.
    A shared bias is a group of its own: all workers gather it, between parts that only some of them gather. Parameters
    within a part that all workers hold (norms of a head) belong to the root, which is gathered before all parts.
    A part's tensors in modules that a forward may leave out are gathered with the modules that it calls.
    """
    plan, everyone = subnetwork.plan, subnetwork.plan.everyone
    groups: list[tuple[tuple[str, ...], Holders]] = [
        ((bias.module,), everyone) for module in subnetwork.modules for bias in module.biases
    ]
    if subnetwork.modules and not plan.is_full:
        by_layer: dict[tuple[int, int], list[str]] = {}
        for local in subnetwork.parts:
            by_layer.setdefault((local.part.module.layer, local.part.holder_set), []).extend(local.modules)
        groups += [(tuple(modules), plan.holder_sets[number]) for (_, number), modules in by_layer.items()]
    else:  # every worker has everything: plain FSDP2, layer by layer
        groups += [((layer,), everyone) for layer in structure.layers]
    groups += [(modules, everyone) for modules in structure.outer]
    groups.append(((ROOT,), everyone))
    with_part = {name: part.modules[0] for part in subnetwork.parts for name in part.tensors}
    return _with_tensors(groups, subnetwork.tensors, with_part)


def shardable_modules(subnetwork: Subnetwork, structure: Structure) -> list[str]:
    """Local names of all modules that :func:`sharding_groups` may name, whatever the holder sets."""
    parts = [name for local in subnetwork.parts for name in local.modules]
    biases = [bias.module for module in subnetwork.modules for bias in module.biases]
    outer = [name for modules in structure.outer for name in modules]
    return [*biases, *parts, *structure.layers, *outer, ROOT]


def data_parallel_groups(structure: Structure, shapes: Mapping[str, Shape], num_workers: int) -> list[Group]:
    """Plain FSDP2 of a full model, as Accelerate and torchtitan wrap it: each layer, and the root with all else."""
    world = tuple(range(num_workers))
    groups = [((layer,), world) for layer in structure.layers]
    tensors = {name: LocalTensor(Region.whole(name, shape), world) for name, shape in shapes.items()}
    return _with_tensors([*groups, ((ROOT,), world)], tensors)


def _with_tensors(
    groups: Iterable[tuple[tuple[str, ...], Holders]],
    tensors: Mapping[str, LocalTensor],
    with_part: Mapping[str, str] = MappingProxyType({}),
) -> list[Group]:
    """Each parameter belongs to the group of the innermost module around it that has its holders.

    ``with_part``: parameter of a part -> a module of the part's group.
    """
    made = [Group(modules, holders, {}) for modules, holders in groups]
    group_of = {module: group for group in made for module in group.modules}
    for name, tensor in tensors.items():
        owner = with_part.get(name) or name.rpartition(".")[0]
        while owner not in group_of or group_of[owner].holders != tensor.holders:
            assert owner, f"no group has the holders of {name}"
            owner = owner.rpartition(".")[0]
        group_of[owner].tensors[name] = tensor.region
    return made
