"""Gradients across the world: their norm, clipping, and the fp16 loss scaler.

Each element of the averaged gradient has one owner, so the norm of the full gradient is the norm over everybody's
local shards; replicated shards count once. A norm per worker or per mesh would give workers different clip factors.
"""

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..errors import SDPStateError
from ..model.state import local_tensor
from ..world.agreement import together
from .optimizer import local_shards, model_of
from .sharded import refuse_forgotten


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[nn.Parameter], max_norm: float, norm_type: float = 2.0) -> torch.Tensor:
    """Norm of the full averaged gradient, float32 scalar; gradients are scaled in place if it exceeds ``max_norm``.

    As ``torch.nn.utils.clip_grad_norm_`` on the full model. Collective over the world: one scalar.
    """
    parameters = list(parameters)
    grads = [p.grad for p in parameters if p.grad is not None]
    device = parameters[0].device if parameters else torch.device("cpu")
    norm = _norm(grads, float(norm_type), device)
    if math.isfinite(max_norm):
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        for dtype_grads in _by_dtype([local_tensor(g) for g in grads]).values():
            torch._foreach_mul_(dtype_grads, factor.to(dtype_grads[0]))
    return norm


@torch.no_grad()
def global_norm(tensors: Iterable[torch.Tensor], norm_type: float = 2.0) -> torch.Tensor:
    """Norm of the full tensors of which these are this worker's shards, float32 scalar. Collective.

    ``torch.nn.utils.get_total_norm`` cannot do this: the shards are of several meshes, and each worker has others.

    Args:
        tensors: parameters of a prepared model, their gradients, or tensors computed from them.
        norm_type: p of the p-norm, above 0; ``math.inf`` is the largest absolute value.
    Raises: SDPStateError on a tensor that is not sharded (between a forward and its backward a model's parameters are
        gathered), and on parameters of before a phase began, which have no values any more.
    """
    tensors = list(tensors)
    with together():
        refuse_forgotten(tensors)
        plain = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, DTensor)]
        if plain:
            raise SDPStateError(
                f"global_norm needs the shards of a prepared model, but {len(plain)} of {len(tensors)} tensors are "
                f"plain ones, the first of shape {plain[0]}. Call it after backward, or before the next forward."
            )
    return _norm(tensors, float(norm_type), tensors[0].device if tensors else torch.device("cpu"))


def _norm(tensors: list[torch.Tensor], norm_type: float, device: torch.device) -> torch.Tensor:
    """``device``: on which the workers talk, also about no tensors: NCCL sends nothing that is on the CPU."""
    by_replicas: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors:
        local = local_tensor(tensor)
        if local.numel():  # of nothing there is no largest element
            by_replicas.setdefault(_num_replicas(tensor), []).append(local)
    total = torch.zeros((), dtype=torch.float32, device=device)
    for num_replicas, of_replicas in by_replicas.items():
        norms = torch.stack(
            [n.float() for group in _by_dtype(of_replicas).values() for n in torch._foreach_norm(group, norm_type)]
        )
        if norm_type == math.inf:
            total = torch.maximum(total, norms.max())
        else:
            total += norms.pow(norm_type).sum() / num_replicas
    dist.all_reduce(total, op=dist.ReduceOp.MAX if norm_type == math.inf else dist.ReduceOp.SUM)
    return total if norm_type == math.inf else total.pow(1.0 / norm_type)


def _num_replicas(grad: torch.Tensor) -> int:
    if not isinstance(grad, DTensor):
        return 1
    return math.prod(
        grad.device_mesh.size(i) for i, placement in enumerate(grad.placements) if placement.is_replicate()
    )


def _by_dtype(tensors: list[torch.Tensor]) -> dict[torch.dtype, list[torch.Tensor]]:
    groups: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    return groups


class GlobalGradScaler(torch.amp.GradScaler):
    """``torch.amp.GradScaler`` that skips a step on every worker when any worker's gradients overflow.

    ``unscale_`` and ``step`` are collective for the optimizer of a sharded SDP model, plain for others.
    """

    def _unscale_grads_(self, optimizer, *args, **kwargs):
        with local_shards(optimizer):
            found_inf_per_device = super()._unscale_grads_(optimizer, *args, **kwargs)
        if model_of(optimizer) is not None:
            for found_inf in found_inf_per_device.values():
                dist.all_reduce(found_inf, op=dist.ReduceOp.MAX)
        return found_inf_per_device
