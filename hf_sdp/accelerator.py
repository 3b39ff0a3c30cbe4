"""``SDPAccelerator``: an Accelerator that shards patched models by their plan instead of wrapping them in DDP."""

import os

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from .canonical import consolidate
from .compat import reset_after_exception
from .config import SDPConfig
from .engine import shard
from .errors import SDPConfigError, SDPStateError
from .gradients import GlobalGradScaler, clip_grad_norm
from .optimizer import refuse_unless_elementwise, repoint
from .patch import patch_model
from .state import find_state, unwrap

_OTHER_ENGINES = {
    DistributedType.FSDP: "FSDP",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
    DistributedType.XLA: "XLA",
}


class SDPAccelerator(Accelerator):
    """``accelerate.Accelerator`` for models patched with :func:`hf_sdp.patch_model`.

    ``prepare`` shards the model, re-points its optimizers, and leaves dataloaders, schedulers, autocast, compilation
    and gradient accumulation to Accelerate. Optimizers may be made before or after.

    Args:
        sdp_config: with it, ``prepare`` also patches a model that is not patched yet.
    Raises: SDPConfigError on every worker, before anything is changed: FSDP, DeepSpeed or another engine configured
        at the same time, a world of one worker, a world that is not what was launched, an unpatched model without
        ``sdp_config``.
    Source: accelerate/accelerator.py (prepare, prepare_model, clip_grad_norm_, get_state_dict, no_sync).
    """

    def __init__(self, *args, sdp_config: SDPConfig | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.sdp_config = sdp_config
        if self.scaler is not None and isinstance(self.scaler, torch.amp.GradScaler):
            options = self.scaler_handler.to_kwargs() if self.scaler_handler is not None else {}
            self.scaler = GlobalGradScaler(self.device.type, **options)

    def prepare(self, *args, device_placement=None):
        models = [a for a in args if isinstance(a, nn.Module)]
        optimizers = [a for a in args if isinstance(a, torch.optim.Optimizer)]
        for model in models:
            self._check(model)
        if models or any(getattr(o, "_sdp_model", None) is not None for o in optimizers):
            for optimizer in optimizers:
                refuse_unless_elementwise(_inner(optimizer))
        # Models first, whatever the order of the arguments: optimizers are re-pointed to the sharded parameters.
        for model in models:
            self._shard(model)
            for optimizer in optimizers:
                if find_state(model).sharded:
                    repoint(_inner(optimizer), model)
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False):
        self._check(model)
        self._shard(model)
        simulated = find_state(model).simulated
        return super().prepare_model(
            model,
            device_placement=device_placement if simulated else False,
            evaluation_mode=evaluation_mode or not simulated,  # not in DDP: the engine synchronizes
        )

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None):
        if not getattr(optimizer, "_is_accelerate_prepared", False):
            models = [m for m in self._models if (s := find_state(m)) is not None and s.sharded]
            if models:
                repoint(optimizer, models[-1])
        return super().prepare_optimizer(optimizer, device_placement=device_placement)

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        """Norm of the full averaged gradient of all workers, which is clipped to ``max_norm``. Collective."""
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if not self._has_sharded_model():
            return super().clip_grad_norm_(parameters, max_norm, norm_type)
        self.unscale_gradients()
        return clip_grad_norm(parameters, max_norm, norm_type)

    def clip_grad_value_(self, parameters, clip_value):
        if self._has_sharded_model():
            self.unscale_gradients()
            for p in parameters:
                if p.grad is not None:
                    p.grad.to_local().clamp_(-clip_value, clip_value)
            return
        super().clip_grad_value_(parameters, clip_value)

    def get_state_dict(self, model: nn.Module, unwrap: bool = True):
        """The full state dict on the CPU of rank 0, None elsewhere. Collective. See :func:`hf_sdp.consolidate`."""
        if find_state(model) is None:
            return super().get_state_dict(model, unwrap)
        return consolidate(model)

    def save_state(self, *args, **kwargs):
        self._refuse_state("save_state")
        return super().save_state(*args, **kwargs)

    def load_state(self, *args, **kwargs):
        self._refuse_state("load_state")
        return super().load_state(*args, **kwargs)

    def free_memory(self, *objects):
        for model in self._models:
            if find_state(model) is not None:
                reset_after_exception(unwrap(model))  # a step that ran out of memory is tried again
        return super().free_memory(*objects)

    def _refuse_state(self, what: str) -> None:
        if self._has_sharded_model():
            raise SDPStateError(
                f"{what} is not supported for SDP models yet: optimizer state would be one worker's only. "
                "Save the weights with save_model, a standard checkpoint of the full model."
            )

    def _has_sharded_model(self) -> bool:
        return any((s := find_state(m)) is not None and s.sharded for m in self._models)

    def _check(self, model: nn.Module) -> None:
        if self.distributed_type in _OTHER_ENGINES:
            raise SDPConfigError(
                f"{_OTHER_ENGINES[self.distributed_type]} is configured, but an SDP model is sharded by hf_sdp. Remove it "
                "from the accelerate config (or TrainingArguments); SDPConfig(sharding='full') is FSDP2 among the holders."
            )
        if getattr(self, "parallelism_config", None) is not None:
            raise SDPConfigError("ParallelismConfig is set, but an SDP model is sharded by hf_sdp. Remove it.")
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.num_processes:
            raise SDPConfigError(
                f"WORLD_SIZE={launched} workers were launched, but Accelerate runs with {self.num_processes}. "
                "Launch with a file of configs/accelerate/ (on CPU: ACCELERATE_USE_CPU=true)."
            )
        state = find_state(model)
        if state is None:
            if self.sdp_config is None:
                raise SDPConfigError(
                    f"{type(model).__name__} is not patched. Call patch_model(model, SDPConfig(...)) before prepare, or use "
                    "SDPAccelerator(sdp_config=SDPConfig(...))."
                )
            if self.num_processes == 1 and not self.sdp_config.simulate:
                raise SDPConfigError(
                    "SDP needs at least 2 workers, this world has 1. Use a file of configs/accelerate/."
                )
        elif self.sdp_config is not None and self.sdp_config != state.config:
            raise SDPConfigError(f"The model was patched with {state.config}, the accelerator has {self.sdp_config}.")

    def _shard(self, model: nn.Module) -> None:
        if find_state(model) is None:
            patch_model(model, self.sdp_config)
        shard(model, self.device)


def _inner(optimizer):
    return getattr(optimizer, "optimizer", optimizer)
