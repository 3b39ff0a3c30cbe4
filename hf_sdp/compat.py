"""The one place that knows of differences between supported versions and of names the hosts do not export.

Supported: torch >= 2.11, transformers >= 5.17, accelerate >= 1.12.
"""

import importlib.metadata
import inspect

from torch import nn
from torch.distributed.distributed_c10d import _get_default_store as default_store
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from transformers.conversion_mapping import get_model_conversion_mapping

__all__ = [
    "DefaultAllGather",
    "DefaultReduceScatter",
    "checkpoint_activations",
    "converts_checkpoints",
    "default_store",
    "reset_after_exception",
    "saves_on_every_rank",
    "versions",
]


def reset_after_exception(model: nn.Module) -> None:
    """Forget a forward or backward that an exception cut short (torch >= 2.13; before, FSDP2 cannot)."""
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute decoder layers in backward, non-reentrant (the method's name is new in transformers 5.23)."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def converts_checkpoints(model: nn.Module) -> bool:
    """Whether tensors of the model's checkpoints have other names or shapes than its parameters (transformers >= 5
    converts them while loading and back while saving)."""
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def saves_on_every_rank(trainer_class: type) -> bool:
    """Whether ``Trainer.save_model`` enters ``_save`` on every rank (later versions of transformers), or on rank 0 only."""
    return "not self.args.should_save" in inspect.getsource(trainer_class._save)


def versions() -> dict[str, str]:
    """Of what decides how a checkpoint is written."""
    return {name: importlib.metadata.version(name) for name in ("hf_sdp", "torch", "transformers", "accelerate")}
