"""``SDPAccelerator``: an Accelerator that shards patched models by their plan instead of wrapping them in DDP."""

import contextlib

import torch
from torch import nn

from ..compat import reset_after_exception
from ..config import SDPConfig
from ..engine.consolidate import consolidate
from ..engine.gradients import GlobalGradScaler, clip_grad_norm
from ..engine.optimizer import inner_optimizer, model_of, owner_of, refuse_unless_elementwise, repoint
from ..engine.presence import announce
from ..engine.same_optimizer import agree_on_options
from ..engine.shard import shard
from ..engine.sharded import find_sharded, refuse_parameters_of_before
from ..engine.vote import Watch
from ..errors import SDPConfigError
from ..model.state import find_state, unwrap
from ..patch import patch_model
from ..phases import follow_schedule
from ..world.agreement import together
from ..world.groups import end_groups
from .accelerator_state import SavesState
from .optimizer import VotingOptimizer
from .refusals import refuse_models


class SDPAccelerator(SavesState):
    """``accelerate.Accelerator`` for models patched with :func:`hf_sdp.patch_model`.

    ``prepare`` shards the model, re-points its optimizers, and leaves dataloaders, schedulers, autocast, compilation
    and gradient accumulation to Accelerate. Optimizers may be made before or after.

    Models that cannot learn here stay Accelerate's (teachers, reference and reward models): those of which no parameter
    requires a gradient, and what is prepared by ``prepare_model(model, evaluation_mode=True)``.

    Args:
        sdp_config: with it, ``prepare`` also patches the one model that can learn, if it is not patched yet.
    Raises: SDPConfigError on every worker, before anything is changed: FSDP, DeepSpeed or another engine configured
        at the same time, a world of one worker, a world that is not what was launched, an unpatched model that can
        learn without ``sdp_config`` or beside another one, an optimizer of nothing that SDP trains.
    Source: accelerate/accelerator.py (prepare, prepare_model, clip_grad_norm_, get_state_dict, no_sync).
    """

    # The base class's.
    scaler: torch.amp.GradScaler | None

    def __init__(self, *args, sdp_config: SDPConfig | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self._become_sdp(sdp_config)

    def _become_sdp(self, sdp_config: SDPConfig | None) -> None:
        """What an Accelerator has beside what any has."""
        self.sdp_config = sdp_config
        self._watch = Watch()
        if self.scaler is not None and isinstance(self.scaler, torch.amp.GradScaler):
            options = self.scaler_handler.to_kwargs() if self.scaler_handler is not None else {}
            self.scaler = GlobalGradScaler(self.device.type, **options)

    def prepare(self, *args, device_placement=None):
        models = [a for a in args if isinstance(a, nn.Module) and self._trains(a)]
        optimizers = [a for a in args if isinstance(a, torch.optim.Optimizer) and not self._is_left_dense(a)]
        if models or optimizers:
            with together():
                refuse_models(self, models, self.sdp_config)
                if not models and not any(find_state(m) for m in self._models):
                    for optimizer in optimizers:
                        self._refuse_optimizer_without_model(optimizer)
                if models or any(model_of(o) is not None for o in optimizers):
                    for optimizer in optimizers:
                        refuse_unless_elementwise(inner_optimizer(optimizer))
        if models:
            agree_on_options([inner_optimizer(optimizer) for optimizer in optimizers])
        # Models first, whatever the order of the arguments: optimizers are re-pointed to the sharded parameters.
        for model in models:
            self._shard(model)
        sharded = [model for model in models if find_sharded(model) is not None]
        if sharded:
            for optimizer in optimizers:
                repoint(inner_optimizer(optimizer), owner_of(inner_optimizer(optimizer), sharded))
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False):
        if find_state(model) is None and (evaluation_mode or not _can_learn(model)):
            return super().prepare_model(model, device_placement, evaluation_mode=True)  # DDP refuses frozen models
        refuse_models(self, [model], self.sdp_config)
        self._shard(model)
        simulated = find_sharded(model) is None
        return super().prepare_model(
            model,
            device_placement=device_placement if simulated else False,
            evaluation_mode=evaluation_mode or not simulated,  # not in DDP: the engine synchronizes
        )

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None):
        if not getattr(optimizer, "_is_accelerate_prepared", False) and not self._is_left_dense(optimizer):
            models = [m for m in self._models if find_sharded(m) is not None]
            if models and model_of(optimizer) is None:
                agree_on_options([optimizer])
                repoint(optimizer, owner_of(optimizer, models))
        prepared = super().prepare_optimizer(optimizer, device_placement=device_placement)
        if model_of(inner_optimizer(prepared)) is not None and not isinstance(prepared, VotingOptimizer):
            VotingOptimizer.take_place(prepared, self._watch)
        return prepared

    def backward(self, loss, **kwargs):
        if self._has_sharded_model():
            self._watch.saw_loss(loss)
        super().backward(loss, **kwargs)

    def gather(self, tensor):
        self._announce("accelerator.gather")
        return super().gather(tensor)

    def reduce(self, tensor, reduction="sum", scale=1.0):
        self._announce("accelerator.reduce")
        return super().reduce(tensor, reduction, scale)

    def wait_for_everyone(self):
        self._announce("accelerator.wait_for_everyone")
        super().wait_for_everyone()

    def _announce(self, what: str) -> None:
        for model in self._models:
            announce(model, what)

    @contextlib.contextmanager
    def accumulate(self, *models):
        """As ``Accelerator.accumulate``. A simulation counts its micro-batches by it."""
        cursors = [state.run.cursor for state in map(find_state, models) if state is not None]
        with super().accumulate(*models):
            for cursor in cursors:
                cursor.start(cursor.micro_batch)
            yield
        for state in filter(None, map(find_state, models)):  # a phase may have begun within
            cursor = state.run.cursor
            cursor.start(0 if self.sync_gradients else cursor.micro_batch + 1)

    def follow_schedule(self, step: int, num_steps: int) -> bool:
        """Begin the phase of a ``coverage_schedule`` that the next step belongs to: call it before each step.

        Collective where a phase begins, and at the second step. Where one begins parameters are new ones: take
        ``model.parameters()`` again.

        Args:
            step: counted from 0, of ``num_steps`` optimizer steps in all.
        Returns: whether a model was rebuilt.
        Raises: as :func:`hf_sdp.follow_schedule`; SDPConfigError when no prepared model has a schedule.
        """
        models = [unwrap(model) for model in self._models]
        scheduled = [model for model in models if (state := find_state(model)) is not None and state.schedule]
        if not scheduled:
            raise SDPConfigError("follow_schedule: no model was prepared that has an SDPConfig(coverage_schedule=...).")
        optimizers = [inner_optimizer(optimizer) for optimizer in self._optimizers]
        return any(
            [follow_schedule(m, step, num_steps, [o for o in optimizers if model_of(o) is m]) for m in scheduled]
        )

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        """Norm of the full averaged gradient of all workers, which is clipped to ``max_norm``. Collective."""
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if not self._has_sharded_model():
            return super().clip_grad_norm_(parameters, max_norm, norm_type)
        self._refuse_parameters_of_before(parameters)
        self.unscale_gradients()
        norm = clip_grad_norm(parameters, max_norm, norm_type)
        self._watch.saw_norm(norm, parameters)
        return norm

    def clip_grad_value_(self, parameters, clip_value):
        if self._has_sharded_model():
            parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
            self._refuse_parameters_of_before(parameters)
            self.unscale_gradients()
            for p in parameters:
                if p.grad is not None:
                    p.grad.to_local().clamp_(-clip_value, clip_value)
            return
        super().clip_grad_value_(parameters, clip_value)

    def _refuse_parameters_of_before(self, parameters: list[torch.Tensor]) -> None:
        refuse_parameters_of_before(parameters, filter(None, map(find_sharded, self._models)))

    def get_state_dict(self, model: nn.Module, unwrap: bool = True):
        """The full state dict on the CPU of rank 0, None elsewhere. Collective. See :func:`hf_sdp.consolidate`."""
        if find_state(model) is None:
            return super().get_state_dict(model, unwrap)
        return consolidate(model)

    def free_memory(self, *objects):
        for model in self._models:
            if find_state(model) is not None:
                reset_after_exception(unwrap(model))  # a step that ran out of memory is tried again
        return super().free_memory(*objects)

    def end_training(self):
        super().end_training()
        if not torch.distributed.is_initialized():
            end_groups()

    def _trains(self, model: nn.Module) -> bool:
        """Whether SDP is to train a model that is prepared."""
        return _can_learn(model)

    def _is_left_dense(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer is that of a model which learns without SDP."""
        return False

    def _refuse_optimizer_without_model(self, optimizer: torch.optim.Optimizer) -> None:
        """Prepared before its model it would go on with parameters that are no longer the model's; of a model that was
        left to Accelerate it would train without SDP."""
        raise SDPConfigError(
            f"{type(optimizer).__name__} is prepared without a model that SDP trains. Prepare it with its model, or "
            "after it."
        )

    def _shard(self, model: nn.Module) -> None:
        if find_state(model) is None:
            assert self.sdp_config is not None  # refuse_models has refused the model without it
            patch_model(model, self.sdp_config)
        shard(model, self.device)


def _can_learn(model: nn.Module) -> bool:
    """A patched model belongs to SDP even when all of it is frozen."""
    return find_state(model) is not None or any(p.requires_grad for p in model.parameters())
