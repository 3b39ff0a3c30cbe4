"""Memory of one worker over a step: a trace of its computation, and what a sharding engine allocates around it.

The trace (``trace.py``) says what lives between the moments at which FSDP2's hooks run; an engine (``allocations.py``)
adds at those moments gathered parameters, buffers of collectives, gradients. The same walk gives the order of computation
and communication for ``time.py``. Every formula with its source: ``FORMULAS.md``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from ..plan.plan import Plan
from ..workload import Workload
from .allocations import Action, Engine, FullyShard, Replicated, WorkerMemory
from .groups import Skeleton, fsdp_groups, sdp_groups, skeleton
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


def worker_memory(
    model_config: PretrainedConfig,
    plan: Plan,
    subnetwork: int,
    workload: Workload,
    *,
    sharding: str = "full",
    reshard_after_forward: bool = False,
    world_size: int | None = None,
) -> WorkerMemory:
    """Memory of a worker that holds ``subnetwork`` of ``plan``. Milliseconds after the first call with a layer of the same
    structure; nothing is allocated.

    Args:
        model_config: of the full model; ``plan`` may give each unit its own number of holders.
        sharding, reshard_after_forward: as in ``SDPConfig``.
        world_size: workers; default: one for each subnetwork.
    """
    return sdp_step(
        model_config,
        plan,
        subnetwork,
        workload,
        sharding=sharding,
        reshard_after_forward=reshard_after_forward,
        world_size=world_size,
    ).memory


def sdp_step(
    model_config: PretrainedConfig,
    plan: Plan,
    subnetwork: int,
    workload: Workload,
    *,
    sharding: str = "full",
    reshard_after_forward: bool = False,
    world_size: int | None = None,
) -> Step:
    """As :func:`worker_memory`, with traffic and the order of everything."""
    shapes = skeleton(model_config)
    layers, outside = trace_subnetwork(model_config, workload, plan, subnetwork)
    groups = sdp_groups(plan, subnetwork, shapes, world_size or plan.num_subnetworks, sharding)
    return _walk(shapes, layers, outside, FullyShard(groups, workload, reshard_after_forward, prefetches=False))


def fsdp_step(
    model_config: PretrainedConfig, workload: Workload, world_size: int, *, reshard_after_forward: bool = True
) -> Step:
    """Plain FSDP2 (ZeRO-3), layer by layer, with its default prefetching."""
    shapes = skeleton(model_config)
    groups = fsdp_groups(shapes, world_size)
    engine = FullyShard(groups, workload, reshard_after_forward, prefetches=True)
    layers = trace(model_config, workload)
    return _walk(shapes, layers, layers[0], engine)


def replicated_step(model_config: PretrainedConfig, workload: Workload, world_size: int, *, zero_stage: int) -> Step:
    """DDP (``zero_stage=0``), ZeRO-1 and ZeRO-2: every worker has all parameters. Another dtype of computation than the
    stored one means autocast for DDP, and for ZeRO parameters and gradients in that dtype."""
    shapes = skeleton(model_config)
    engine = Replicated(shapes, workload, world_size, zero_stage)
    layers = trace(model_config, workload, autocast=zero_stage == 0 and workload.dtype != workload.param_dtype)
    return _walk(shapes, layers, layers[0], engine)


def _stream(shapes: Skeleton, layers: list[Trace], outside: Trace) -> Iterator[tuple[Segment | Mark, str]]:
    """The whole step, and the prefix of the names in each piece."""
    for item in outside.before:
        yield item, ""
    for index, layer in enumerate(layers):
        for item in layer.layer_forward:
            yield item, f"{shapes.layers}.{index}"
        if index < len(layers) - 1:
            for item in outside.to_second_layer if index == 0 else layer.to_next_layer:
                yield item, ""
    for item in outside.head:
        yield item, ""
    for index, layer in reversed([*enumerate(layers)]):
        for item in layer.layer_backward:
            yield item, f"{shapes.layers}.{index}"
    for item in outside.after:
        yield item, ""


def _walk(shapes: Skeleton, layers: list[Trace], outside: Trace, engine: Engine) -> Step:
    for item, prefix in _stream(shapes, layers, outside):
        if isinstance(item, Mark):
            engine.mark(item.kind, prefix + item.module)
            continue
        engine.note(item.peak)
        engine.activations += item.delta
        if item.flops:
            engine.actions.append(Action("compute", item.flops))
        for name, nbytes in item.gradients.items():
            engine.gradient(prefix + name, nbytes)
        engine.note()
    return Step(engine.result(), tuple(engine.actions))
