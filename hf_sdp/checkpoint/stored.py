"""What of which full parameters a process stores, of an SDP model or any other."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ..engine.sharded import find_sharded
from ..model.state import find_state, unwrap
from ..plan.region import Region, Shape


@dataclass(frozen=True)
class Stored:
    """A parameter of this process.

    Attributes:
        region: what it stores of which full parameter.
        shape: of the full parameter.
        owned: whether this process is the owner of the region.
    """

    region: Region
    shape: Shape
    owned: bool

    @property
    def name(self) -> str:
        return self.region.name


def stored_parameters(model: nn.Module) -> dict[torch.Tensor, Stored]:
    """Of a sharded SDP model what this worker stores; of any other model its full parameters, owned by rank 0."""
    model = unwrap(model)
    sharded = find_sharded(model)
    if sharded is None:
        owned = not dist.is_initialized() or dist.get_rank() == 0
        return {
            p: Stored(Region.whole(name, tuple(p.shape)), tuple(p.shape), owned) for name, p in model.named_parameters()
        }
    held = sharded.held
    mine = {region for regions in held.owners.values() for rank, region in regions if rank == held.rank}
    result: dict[torch.Tensor, Stored] = {}
    for local_name, parameter in sharded.parameters.items():
        region = held.stored(local_name)
        result[parameter] = Stored(region, held.plan.shapes[region.name], region in mine)
    return result


def full_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Full parameter name -> shape, in the order of the full model's ``named_parameters()``."""
    state = find_state(model)
    if state is not None:
        return state.held.plan.shapes
    return {name: tuple(p.shape) for name, p in unwrap(model).named_parameters()}
