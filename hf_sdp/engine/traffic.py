"""Counts the bytes a worker sends for parameters and gradients.

Counted where FSDP2 calls a collective, as a ring sends them: of an all-gather or reduce-scatter over n members every
member sends ``(n-1)/n`` of the gathered size, of an all-reduce twice that. Scalars (loss, gradient norm) and
evaluation are left out.
"""

from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn

from ..compat import DefaultAllGather, DefaultReduceScatter, fsdp_groups
from ..model.state import unwrap
from ..world.ring import BOTH_WAYS, sent_in_ring
from .fsdp import fsdp_modules


class BytesSent(Protocol):
    """Anything that counts the bytes that this worker sends."""

    bytes_sent: int


class Watch(Protocol):
    """Is told of every collective: kind, local name of the module, its group, and what this worker gives or gets."""

    def __call__(self, kind: str, module: str, group: dist.ProcessGroup, shard: torch.Tensor) -> None: ...


class Traffic:
    """``bytes_sent`` of this worker since it was made, ``num_collectives`` likewise. ``watch`` is told of each."""

    def __init__(self, model: nn.Module):
        self.bytes_sent = 0
        self.num_collectives = 0
        self.watch: Watch | None = None
        names = {module: name for name, module in unwrap(model).named_modules()}
        for module in fsdp_modules(model):
            name = names[module]
            module.set_custom_all_gather(_CountedAllGather(self, name))
            module.set_custom_reduce_scatter(_CountedReduceScatter(self, name))
            for group in fsdp_groups(module):
                if group._is_hsdp:
                    module.set_all_reduce_hook(self._all_reduced(name, group.mesh_info.replicate_process_group))

    def add(self, kind: str, module: str, group: dist.ProcessGroup, shard: torch.Tensor, bytes_sent: int) -> None:
        self.bytes_sent += bytes_sent
        self.num_collectives += 1
        if self.watch is not None:
            self.watch(kind, module, group, shard)

    def _all_reduced(self, name: str, group: dist.ProcessGroup):
        def hook(reduced: torch.Tensor) -> None:  # runs after FSDP2's own all-reduce
            self.add("all-reduce", name, group, reduced, int(sent_in_ring(reduced.nbytes, group.size(), BOTH_WAYS)))

        return hook


class _CountedAllGather(DefaultAllGather):
    def __init__(self, traffic: Traffic, module: str):
        self.traffic, self.module = traffic, module

    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        self.traffic.add("all-gather", self.module, group, input_tensor, (group.size() - 1) * input_tensor.nbytes)
        return super().__call__(output_tensor, input_tensor, group, async_op)


class _CountedReduceScatter(DefaultReduceScatter):
    def __init__(self, traffic: Traffic, module: str):
        self.traffic, self.module = traffic, module

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        self.traffic.add("reduce-scatter", self.module, group, output_tensor, (group.size() - 1) * output_tensor.nbytes)
        return super().__call__(output_tensor, input_tensor, group, op, async_op)
