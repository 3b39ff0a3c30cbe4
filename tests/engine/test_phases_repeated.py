"""Boundaries back and forth: nothing of a phase that has ended stays in the process."""

import gc
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from tests.support.training import one_step, prepared
from tests.support.workers import run_workers


def kept(model, optimizer) -> dict[str, int]:
    """What there is of everything that a boundary makes anew."""
    gc.collect()
    things = [thing for thing in gc.get_objects() if not isinstance(thing, dict | tuple | list)]
    tensors = [thing for thing in things if issubclass(type(thing), torch.Tensor) and not thing.is_meta]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in map(_local, tensors)}
    hooks = [
        name
        for module in model.modules()
        for name, value in vars(module).items()
        if name.endswith("_hooks") and isinstance(value, dict)
        for _ in value
    ]
    return {
        "process groups": len(_world.pg_map),
        "threads": len(os.listdir("/proc/self/task")),
        "files": len(os.listdir("/proc/self/fd")),
        "bytes": sum(storages.values()),
        "tensors": len(tensors),
        "objects": len(things),
        "modules": len([*model.modules()]),
        "hooks of modules": len(hooks),
        "hooks of the optimizer": len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks),
    }


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return getattr(tensor, "_local_tensor", tensor)


def back_and_forth(level: str, boundaries: int) -> list[dict[str, int]]:
    accelerator, model, optimizer = prepared(dict(level=level, coverage_schedule=[(0.0, 2 / 3), (0.5, 1.0)]))
    found = []
    for boundary in range(1, boundaries + 1):
        one_step(accelerator, model, optimizer)
        assert accelerator.follow_schedule(boundary % 2, 2)
        if boundary in (3, 4, boundaries - 1, boundaries):
            dist.barrier()
            found.append(kept(model, optimizer.optimizer))
    return found


@pytest.mark.parametrize(
    ("level", "boundaries"),
    [("block", 8), *(pytest.param(level, 20, marks=pytest.mark.long) for level in ("neuron", "block"))],
)
def test_many_boundaries_leave_no_more_than_four(level, boundaries):
    for found in run_workers(back_and_forth, level, boundaries, world_size=3):
        for early, late in zip(found[:2], found[2:], strict=True):  # in the second phase, and in the first
            more = late.pop("objects") - early.pop("objects")
            assert more < 20  # caches of torch fill up; what belongs to a plan is hundreds
            assert late == early and all(late.values())
