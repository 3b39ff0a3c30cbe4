"""The meshes of a plan: who gathers and reduces what with whom."""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..plan.holders import Holders
from ..plan.placement import Placement
from ..plan.plan import Plan
from ..world.groups import shared_group


def make_meshes(plan: Plan, placement: Placement, device_type: str) -> dict[Holders, DeviceMesh]:
    """The mesh of each holder set that this worker is in. Collective: all workers make all groups, in sorted order.

    A mesh with replicas has the dims ("replicate", "shard"), as HSDP; one without has "shard" alone.
    ``sharding="none"`` has one shard, and replicas only. Models share the groups, see ``world/groups.py``.
    """
    sets = plan.holder_sets if plan.masking == "forward" else (plan.everyone,)
    ranks = {holders: placement.mesh(holders) for holders in sets}
    if any(len(row) == 1 for rows in ranks.values() for row in rows):
        # Every worker its own, at one point: NCCL may split the world's communicator, in which all take part.
        shared_group([dist.get_rank()])
    meshes = {}
    for holders, rows in ranks.items():
        shards = [group for row in rows if (group := shared_group(row))]
        if len(rows) == 1 and placement.sharding == "full":
            if shards:
                meshes[holders] = DeviceMesh.from_group(shards[0], device_type, mesh_dim_names=("shard",))
            continue
        replicas = [group for column in zip(*rows, strict=True) if (group := shared_group(column))]
        if shards:
            meshes[holders] = DeviceMesh.from_group(
                [replicas[0], shards[0]], device_type, torch.tensor(rows), mesh_dim_names=("replicate", "shard")
            )
    return meshes


def world_mesh(device_type: str) -> DeviceMesh:
    """Of all workers, with the one dim "shard". Collective."""
    group = shared_group(range(dist.get_world_size()))
    assert group is not None
    return DeviceMesh.from_group(group, device_type, mesh_dim_names=("shard",))
