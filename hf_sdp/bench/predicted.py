"""What the estimate says of an engine by the name under which ``fake_world`` runs it."""

from ..config import SDPConfig
from ..estimate.memory import Step, fsdp_step, replicated_step, sdp_step
from ..estimate.names import DDP, FSDP2
from ..estimate.shapes import Model
from ..planner import make_plan, num_subnetworks_of
from ..workload import Workload


def predicted_step(model: Model, engine: SDPConfig | str, workload: Workload, world_size: int, rank: int = 0) -> Step:
    """A step of worker ``rank``. ``engine``: as in ``fake_world.parallelize``; ``model``: full, not patched."""
    if engine == DDP:
        return replicated_step(model, workload, world_size, zero_stage=0)
    if isinstance(engine, str):
        return fsdp_step(model, workload, world_size, reshard_after_forward=engine == FSDP2)
    num_subnetworks = num_subnetworks_of(engine, world_size)
    return sdp_step(
        model,
        make_plan(model, engine, num_subnetworks),
        rank % num_subnetworks,
        workload,
        sharding=engine.sharding,
        reshard_after_forward=engine.reshard_after_forward,
        world_size=world_size,
    )
