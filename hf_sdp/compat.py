"""The one place that knows of differences between supported versions and of names the hosts do not export.

Supported: torch >= 2.11, transformers >= 5.17, accelerate >= 1.12.
"""

from torch import nn
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

__all__ = ["DefaultAllGather", "DefaultReduceScatter", "reset_after_exception"]


def reset_after_exception(model: nn.Module) -> None:
    """Forget a forward or backward that an exception cut short (torch >= 2.13; before, FSDP2 cannot)."""
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
