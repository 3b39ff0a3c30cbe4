"""The unmodified ``transformers.Trainer`` with SDP: a callback, and what :func:`install` puts under the Trainer.

Trainer builds ``Accelerator(**args)`` from its module's global, so that name is set to an SDPAccelerator. A few
methods are wrapped; each wrap does nothing for a model that is not patched. Source: transformers/trainer.py.
"""

import contextlib
import functools
import inspect
import logging

import transformers.trainer as host
import transformers.trainer_jit_checkpoint as host_jit_checkpoint
from torch import nn
from transformers import TrainerCallback

from ..checkpoint.save import bytes_to_save
from ..compat import meshes_unseen, norms_mixed_meshes
from ..config import SDPConfig
from ..engine.metrics import StepMeter
from ..engine.presence import come_to
from ..engine.sharded import find_sharded, get_sharded
from ..errors import SDPConfigError, SDPStateError
from ..model.fitness import refuse_what_is_no_model
from ..model.numbers import local_num_parameters
from ..model.state import find_state, get_state
from ..patch import patch_model
from ..phases import follow_schedule
from .accelerator import SDPAccelerator
from .optimizer import VotingOptimizer
from .preemption import AgreedJITCheckpoint
from .refusals import refuse_other_engines
from .replaced import replace
from .trainer_checkpoint import WRAPS, keep_weights, last_checkpoint, let_go_of_weights, refuse_to_overwrite
from .trainer_numbers import NUMBERS, of_the_full_model
from .trainer_splits import SPLITS
from .trainer_together import TOGETHER

logger = logging.getLogger(__name__)


class _TrainerAccelerator(SDPAccelerator):
    """Leaves models that are not patched to Accelerate: :func:`install` is for the whole process."""

    def prepare(self, *args, device_placement=None):
        if any(isinstance(a, nn.Module) and find_state(a) is None for a in args):
            return super(SDPAccelerator, self).prepare(*args, device_placement=device_placement)
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(self, model, device_placement=None, evaluation_mode=False):
        if find_state(model) is None:
            return super(SDPAccelerator, self).prepare_model(model, device_placement, evaluation_mode)
        return super().prepare_model(model, device_placement, evaluation_mode)

    def _refuse_optimizer_without_model(self, optimizer):
        pass  # it is of a model that is not patched


class SDPCallback(TrainerCallback):
    """Trains a patched model under the Trainer, and logs what a worker stores, sends and waits for.

    Makes sure before training that SDP is really on. Logged with the loss: ``sdp/bytes_sent_per_step``,
    ``sdp/peak_bytes`` of a step, ``sdp/step_time_s``, ``sdp/coverage`` of a schedule, and once, as they stay the same,
    ``sdp/state_bytes*_min`` and ``*_max`` over the workers (parameters, gradients, optimizer); ``grad_norm`` is the
    global one.

    Args:
        config: patch the Trainer's model with it, instead of a call of ``patch_model`` in the script.
        keep_weights_gib: after training rank 0 keeps the full weights (of a model of PEFT its adapters) in its host
            memory when they take at most as many GiB, and may then save alone. Of a larger model saving stays a
            collective (0: of every model).
        profile_memory: on the CPU ``sdp/peak_bytes`` needs one step under torch's profiler, which takes a second or
            two and writes lines to the log. On CUDA it is always there.
    Raises: when the Trainer is made, on every worker, SDPConfigError for a model that is not patched without
        ``config``, one that was patched with another, FSDP or DeepSpeed beside it; what ``patch_model`` raises.
    """

    def __init__(self, config: SDPConfig | None = None, *, keep_weights_gib: float = 2.0, profile_memory: bool = False):
        install()
        self.config, self.keep_weights_gib, self.profile_memory = config, keep_weights_gib, profile_memory
        self.meter: StepMeter | None = None
        self._first_training = True

    def on_init_end(self, args, state, control, model=None, **kwargs):
        refuse_other_engines(args.distributed_state.distributed_type)
        if args.bf16_full_eval or args.fp16_full_eval:
            raise SDPConfigError(
                "bf16_full_eval and fp16_full_eval cast the weights that train. Use bf16=True, or load the model with "
                "dtype=torch.bfloat16."
            )
        _warn_of_what_is_ddps(args)
        if find_state(model) is None:
            refuse_what_is_no_model(model)
            if self.config is None:
                raise SDPConfigError(
                    f"SDPCallback: the Trainer's model ({type(model).__name__}) is not patched. Call "
                    "patch_model(model, SDPConfig(...)) before the Trainer is made, or pass "
                    "SDPCallback(SDPConfig(...))."
                )
            patch_model(model, self.config)
            return
        config = get_state(model).config
        if self.config is not None and self.config != config:
            raise SDPConfigError(f"The model was patched with {config}, SDPCallback has {self.config}.")

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        _check_training(args, model)
        let_go_of_weights(model)
        sharded = find_sharded(model)
        saves = args.save_strategy != "no" or args.enable_jit_checkpoint
        # A later training of this process may replace what an earlier one has saved; trials have folders of their own.
        if sharded is not None and saves and self._first_training and not state.is_hyper_param_search:
            if state.global_step == 0:
                refuse_to_overwrite(args.output_dir)
        self._first_training = False
        held = get_state(model).held
        if held.is_cut:  # below the host's "Number of trainable parameters"
            learns = local_num_parameters(model, only_trainable=True)
            host.logger.info(f"  Number of trainable parameters of the subnetwork of rank {held.rank} = {learns:,}")
        schedule = get_state(model).schedule
        if schedule is not None:
            schedule.first_steps(state.max_steps)  # raises when a phase has none
            schedule.host_splits = True
        self.meter = None
        if sharded is not None:
            self._measure(args, model)

    def _measure(self, args, model) -> None:
        traffic = get_sharded(model, "Measuring").traffic
        self.meter = StepMeter(model, args.device, traffic, profiles_memory=self.profile_memory)

    def on_step_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        if follow_schedule(model, state.global_step, state.max_steps, [optimizer]) and self.meter is not None:
            self._measure(args, model)
        get_state(model).run.cursor.start(0)  # a short last window of an epoch must not shift the next one
        if self.meter is not None:
            self.meter.step_begin()

    def on_substep_end(self, args, state, control, model=None, **kwargs):
        cursor = get_state(model).run.cursor
        cursor.start(cursor.micro_batch + 1)

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.meter is not None:
            self.meter.gradients_ready()
        if isinstance(optimizer, VotingOptimizer):
            optimizer.at_step = state.global_step + 1

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        if self.meter is not None:
            self.meter.step_end(optimizer)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        sharded = find_sharded(model)
        if sharded is not None and bytes_to_save(model) <= self.keep_weights_gib * 2**30:
            keep_weights(model)  # afterwards rank 0 may save alone


def _warn_of_what_is_ddps(args) -> None:
    names = ("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph")
    given = [name for name in names if getattr(args, name, None) is not None]
    if given and args.should_log:
        logger.warning("%s: without effect, since a patched model is not in DDP.", ", ".join(given))


def _check_training(args, model) -> None:
    state = find_state(model)
    if state is None:
        raise SDPConfigError("The model that trains is not patched (model_init must patch it, too).")
    simulate = state.held.config.simulate
    if simulate is not None:
        if args.gradient_accumulation_steps % simulate:
            raise SDPConfigError(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} must be a multiple of "
                f"simulate={simulate}: each virtual worker takes one micro-batch in turn."
            )
    elif find_sharded(model) is None:
        raise SDPStateError(
            "The model was not sharded: make SDPCallback() (or call hf_sdp.enable()) before the Trainer."
        )


def install() -> None:
    """Let every Trainer made from now on in this process handle patched models. Called by ``SDPCallback()``.

    Raises: SDPStateError when the installed transformers has other Trainer methods than this version knows.
    """
    if host.Accelerator is _TrainerAccelerator:
        return
    wraps = {**WRAPS, **TOGETHER, **SPLITS, **NUMBERS, "log": _log, "create_optimizer": _one_group_for_all_meshes}
    if norms_mixed_meshes(host.Trainer):
        wraps["_has_mixed_mesh_grads"] = _use_the_accelerators_norm
    for name, wrap in wraps.items():
        method = getattr(host.Trainer, name, None)
        expected = [n for n, p in inspect.signature(wrap(None)).parameters.items() if p.kind is not p.VAR_KEYWORD]
        if method is None or list(inspect.signature(method).parameters)[: len(expected)] != expected:
            raise SDPStateError(
                f"transformers {host.__version__}: Trainer.{name} is not what hf_sdp was written for "
                f"({'missing' if method is None else inspect.signature(method)}, expected {expected})."
            )
    for name, wrap in wraps.items():
        original = getattr(host.Trainer, name)
        replace(host.Trainer, name, functools.wraps(original)(wrap(original)))
    replace(host, "get_last_checkpoint", last_checkpoint)
    replace(host, "get_model_param_count", of_the_full_model(host.get_model_param_count))
    replace(host_jit_checkpoint, "JITCheckpointCallback", AgreedJITCheckpoint)
    replace(host, "Accelerator", _TrainerAccelerator)


def _log(original):
    def log(self, logs, start_time=None):
        callback = next((c for c in self.callback_handler.callbacks if isinstance(c, SDPCallback)), None)
        if callback is not None and callback.meter is not None and "loss" in logs:
            come_to(self.model, "logging the loss")
            logs.update(callback.meter.report(world=True))
            schedule = get_state(self.model).schedule
            if schedule is not None:
                logs["sdp/coverage"] = schedule.current.phase.coverage
        return original(self, logs, start_time)

    return log


def _one_group_for_all_meshes(original):
    def create_optimizer(self, model=None):
        # A step sees plain local shards. Groups by mesh would be other ones on each worker, and in each phase.
        with meshes_unseen(host) if find_sharded(self.model) is not None else contextlib.nullcontext():
            return original(self, model)

    return create_optimizer


def _use_the_accelerators_norm(original):
    def _has_mixed_mesh_grads(self, model):
        # The host's norm per mesh sees this worker's meshes only; SDPAccelerator.clip_grad_norm_ sees them all.
        return False if find_sharded(self.model) is not None else original(self, model)

    return _has_mixed_mesh_grads
