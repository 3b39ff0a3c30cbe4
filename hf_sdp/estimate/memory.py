"""Memory of one worker over a step: a trace of its computation, and what a sharding engine allocates around it.

The trace (``trace.py``) says what lives between the moments at which FSDP2's hooks run; an engine (``fully_shard.py``,
``replicated.py``) adds at those moments gathered parameters, buffers of collectives, gradients. The same walk gives the
order of computation and communication for ``time.py``. Every formula with its source: ``FORMULAS.md``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..families import Structure
from ..plan.groups import data_parallel_groups, sharding_groups
from ..plan.placement import Placement
from ..plan.plan import Plan
from ..plan.subnetwork import subnetwork_of, whole_model
from ..workload import Workload
from .allocations import Action, Allocator, WorkerMemory
from .fully_shard import FullyShard
from .groups import stored_groups
from .replicated import Replicated
from .shapes import Model, shapes_of
from .trace import Mark, Segment, Trace, trace, trace_subnetwork


@dataclass(frozen=True)
class Step:
    """What a step of one worker takes."""

    memory: WorkerMemory
    actions: tuple[Action, ...]

    @property
    def bytes_sent(self) -> int:
        return sum(a.amount for a in self.actions if a.kind in ("gather", "reduce"))

    @property
    def flops(self) -> int:
        return sum(a.amount for a in self.actions if a.kind == "compute")


def sdp_step(
    model: Model,
    plan: Plan,
    subnetwork: int,
    workload: Workload,
    *,
    sharding: str = "full",
    reshard_after_forward: bool = False,
    world_size: int | None = None,
    pieces: int = 1,
) -> Step:
    """What a worker that holds ``subnetwork`` of ``plan`` does in a step.

    Nothing is allocated. It takes milliseconds after the first call with a layer of the same structure.

    Args:
        model: full, not patched; ``plan``, made for it, may give each unit its own number of holders.
        sharding, reshard_after_forward: as in ``SDPConfig``.
        world_size: workers; default: one for each subnetwork.
        pieces: in which the micro-batch is computed, each as large as ``workload`` says, and reduced by itself.
    """
    placement = Placement(world_size or plan.num_subnetworks, plan.num_subnetworks, sharding)
    local = subnetwork_of(plan, subnetwork) if plan.masking == "forward" else whole_model(plan)
    shapes = shapes_of(model)
    structure = shapes.structure
    groups = stored_groups(sharding_groups(local, structure), placement, subnetwork, shapes.frozen)
    layers, outside = trace_subnetwork(shapes, workload, plan, subnetwork)
    with_root = [modules[0] for modules in structure.outer]
    allocator = FullyShard(
        groups, workload, reshard_after_forward, prefetches=False, with_root=with_root, accumulates=pieces > 1
    )
    step = _walk(structure, layers, outside, allocator)
    again = tuple(a for a in step.actions if reshard_after_forward or a.kind in ("compute", "reduce"))
    return Step(step.memory, step.actions + again * (pieces - 1))  # parts stay gathered between the pieces


def fsdp_step(model: Model, workload: Workload, world_size: int, *, reshard_after_forward: bool = True) -> Step:
    """Plain FSDP2 (ZeRO-3), layer by layer, with its default prefetching."""
    shapes = shapes_of(model)
    groups = data_parallel_groups(shapes.structure, shapes.tensors, world_size)
    stored = stored_groups(groups, Placement(world_size, world_size, "full"), 0, shapes.frozen)
    allocator = FullyShard(stored, workload, reshard_after_forward, prefetches=True)
    return _walk(shapes.structure, *trace(shapes, workload), allocator)


def replicated_step(model: Model, workload: Workload, world_size: int, *, zero_stage: int) -> Step:
    """DDP (``zero_stage=0``), ZeRO-1 and ZeRO-2: every worker has all parameters.

    DDP computes with parameters as they are stored, under autocast where the dtype of computation is another one. ZeRO
    has parameters and gradients in the dtype of computation.
    """
    shapes = shapes_of(model)
    traces = trace(shapes, workload, as_stored=zero_stage == 0)
    return _walk(shapes.structure, *traces, Replicated(shapes, workload, world_size, zero_stage))


def _stream(structure: Structure, layers: list[Trace], outside: Trace) -> Iterator[tuple[Segment | Mark, str]]:
    """The whole step, and the prefix of the names in each piece."""
    for item in outside.before:
        yield item, ""
    for index, layer in enumerate(layers):
        for item in layer.layer_forward if index else layer.first_forward:
            yield item, structure.layers[index]
        if index < len(layers) - 1:
            for item in outside.to_second_layer if index == 0 else layer.to_next_layer:
                yield item, ""
    for item in outside.head:
        yield item, ""
    for index, layer in reversed([*enumerate(layers)]):
        for item in layer.layer_backward if index else layer.first_backward:
            yield item, structure.layers[index]
    for item in outside.after:
        yield item, ""


def _walk(structure: Structure, layers: list[Trace], outside: Trace, allocator: Allocator) -> Step:
    for item, prefix in _stream(structure, layers, outside):
        if isinstance(item, Mark):
            allocator.mark(item.kind, prefix + item.module)
            continue
        allocator.note(item.peak)
        allocator.activations += item.delta
        if item.flops:
            allocator.actions.append(Action("compute", item.flops))
        for name, nbytes in item.gradients.items():
            allocator.gradient(prefix + name, nbytes)
        allocator.note()
    return Step(allocator.result(), tuple(allocator.actions))
