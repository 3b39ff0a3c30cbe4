"""Counts the bytes a worker sends for parameters and gradients.

Counted where FSDP2 calls a collective, as a ring sends them: of an all-gather or reduce-scatter over n members every
member sends ``(n-1)/n`` of the gathered size, of an all-reduce twice that. Scalars (loss, gradient norm) and
evaluation are left out.
"""

from typing import Protocol

import torch
from torch import nn

from ..compat import DefaultAllGather, DefaultReduceScatter
from .fsdp import fsdp_modules


class BytesSent(Protocol):
    """Anything that counts the bytes that this worker sends."""

    bytes_sent: int


class Traffic:
    """``bytes_sent`` of this worker since it was made, ``num_collectives`` likewise."""

    def __init__(self, model: nn.Module):
        self.bytes_sent = 0
        self.num_collectives = 0
        for module in fsdp_modules(model):
            module.set_custom_all_gather(_CountedAllGather(self))
            module.set_custom_reduce_scatter(_CountedReduceScatter(self))
            for group in module._get_fsdp_state()._fsdp_param_groups:
                if group._is_hsdp:  # its mesh_info is then an HSDPMeshInfo
                    num_replicas = group.mesh_info.replicate_mesh_size  # type: ignore[attr-defined]
                    module.set_all_reduce_hook(self._all_reduced(num_replicas))

    def add(self, bytes_sent: int) -> None:
        self.bytes_sent += bytes_sent
        self.num_collectives += 1

    def _all_reduced(self, num_members: int):
        def hook(reduced: torch.Tensor) -> None:  # runs after FSDP2's own all-reduce
            self.add(2 * (num_members - 1) * reduced.nbytes // num_members)

        return hook


class _CountedAllGather(DefaultAllGather):
    def __init__(self, traffic: Traffic):
        self.traffic = traffic

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self.traffic.add((group.size() - 1) * input_tensor.nbytes)
        return super().__call__(output_tensor, input_tensor, group, async_op)


class _CountedReduceScatter(DefaultReduceScatter):
    def __init__(self, traffic: Traffic):
        self.traffic = traffic

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        self.traffic.add((group.size() - 1) * output_tensor.nbytes)
        return super().__call__(output_tensor, input_tensor, group, op, async_op)
