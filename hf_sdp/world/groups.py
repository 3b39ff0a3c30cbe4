"""Process groups: made once for each set of ranks, shared by all models of the process, and ended before it ends.

A group costs a communicator (under gloo two threads, and a connection to each member), which a process that prepares
many models cannot pay for each of them. Every group has the timeout of the default one.
"""

import atexit
import os
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch.distributed as dist

from ..compat import default_timeout, let_meshes_forget_their_groups

_Made = dict[tuple[tuple[int, ...], str | None], dist.ProcessGroup]

_groups: WeakKeyDictionary[dist.ProcessGroup, _Made] = WeakKeyDictionary()
"""Default group -> ``(ranks, backend)`` -> what was made in it. Forgotten with the default group."""


def shared_group(ranks: Sequence[int], backend: str | None = None) -> dist.ProcessGroup | None:
    """The group of these ranks, made by the first call. None for a worker that is not in it.

    Collective over the world, in one order: workers that are not in the group come, too. But a group of one is made by
    its member alone, so that nobody counts through the whole world; all workers make theirs at one point.

    Args:
        ranks: sorted.
        backend: by default that of the default group, which is itself the group of all ranks then.
    """
    world = dist.group.WORLD
    assert world is not None
    if backend is None and len(ranks) == world.size():
        return world
    if len(ranks) == 1 and world.rank() not in ranks:
        return None
    if world not in _groups:
        _groups[world] = {}
        atexit.register(_end_with_process, os.getpid())
    made, key = _groups[world], (tuple(ranks), backend)
    if key not in made:
        made[key] = dist.new_group(
            list(ranks), timeout=default_timeout(), backend=backend, use_local_synchronization=len(ranks) == 1
        )
    return made[key] if isinstance(made[key], dist.ProcessGroup) else None


def control_group() -> dist.ProcessGroup | None:
    """The gloo group of all workers for small messages; None where nothing is really sent. Collective, as above."""
    if not dist.is_initialized() or dist.get_backend() == "fake":
        return None
    return shared_group(range(dist.get_world_size()), "gloo")


def end_groups() -> None:
    """Let go of all groups over gloo, so that their threads end. No collective is possible afterwards. Not collective.

    A thread of gloo may be about to free what it has sent last, for which it needs the interpreter. In one that is
    being finalized the process would abort. The threads end with their group, when nobody refers to it any more.
    Groups over NCCL are left to the user and to torch.
    """
    for world, made in list(_groups.items()):
        for group in (*made.values(), world):
            if isinstance(group, dist.ProcessGroup) and group.name() == "gloo":
                group.abort()  # what is still under way, after an error, would be waited for
                if dist.group.WORLD is world:
                    dist.destroy_process_group(group)
    _groups.clear()
    if not dist.is_initialized():
        let_meshes_forget_their_groups()


def _end_with_process(pid: int) -> None:
    if os.getpid() == pid:  # a fork has the groups without their threads
        end_groups()
