"""``SDPAccelerator``: an Accelerator that shards patched models by their plan instead of wrapping them in DDP."""

import contextlib
import os
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from accelerate.utils.constants import SCALER_NAME, SCHEDULER_NAME
from torch import nn

from ..checkpoint import folder as checkpoint
from ..checkpoint.files import size_of
from ..checkpoint.load import load_weights, open_optimizer_state, tell_changes
from ..checkpoint.marker import OPTIMIZER, Compared, check_together
from ..checkpoint.optimizer_state import load_optimizer, save_optimizer
from ..checkpoint.save import save_pretrained
from ..compat import reset_after_exception
from ..config import SDPConfig
from ..engine.consolidate import consolidate
from ..engine.gradients import GlobalGradScaler, clip_grad_norm
from ..engine.optimizer import model_of, refuse_unless_elementwise, repoint
from ..engine.presence import announce, come_to
from ..engine.same_optimizer import agree_on_options
from ..engine.shard import shard
from ..engine.sharded import control_group, find_sharded
from ..engine.vote import Watch
from ..errors import SDPConfigError, SDPStateError
from ..model.state import find_state, unwrap
from ..patch import patch_model
from ..world.agreement import from_rank_0, together
from ..world.groups import end_groups
from .optimizer import VotingOptimizer

_OTHER_ENGINES = {
    DistributedType.FSDP: "FSDP",
    DistributedType.DEEPSPEED: "DeepSpeed",
    DistributedType.MEGATRON_LM: "Megatron-LM",
    DistributedType.XLA: "XLA",
}
# Set by TrainingArguments and `accelerate launch`, also where Accelerate then passes over them: on CPU.
_FLAGS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}

_NOT_TRAINED = (
    "A model that is not trained: model.requires_grad_(False), or prepare_model(model, evaluation_mode=True)."
)


class SDPAccelerator(Accelerator):
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
    _models: list[nn.Module]
    _optimizers: list[torch.optim.Optimizer]

    def __init__(self, *args, sdp_config: SDPConfig | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.sdp_config = sdp_config
        self._watch = Watch()
        if self.scaler is not None and isinstance(self.scaler, torch.amp.GradScaler):
            options = self.scaler_handler.to_kwargs() if self.scaler_handler is not None else {}
            self.scaler = GlobalGradScaler(self.device.type, **options)

    def prepare(self, *args, device_placement=None):
        models = [a for a in args if isinstance(a, nn.Module) and _can_learn(a)]
        optimizers = [a for a in args if isinstance(a, torch.optim.Optimizer)]
        if models or optimizers:
            with together():
                self._check(models)
                if not models and not any(find_state(m) for m in self._models):
                    for optimizer in optimizers:
                        self._refuse_optimizer_without_model(optimizer)
                if models or any(model_of(o) is not None for o in optimizers):
                    for optimizer in optimizers:
                        refuse_unless_elementwise(_inner(optimizer))
        if models:
            agree_on_options([_inner(optimizer) for optimizer in optimizers])
        # Models first, whatever the order of the arguments: optimizers are re-pointed to the sharded parameters.
        for model in models:
            self._shard(model)
            for optimizer in optimizers:
                if find_sharded(model) is not None:
                    repoint(_inner(optimizer), model)
        return super().prepare(*args, device_placement=device_placement)

    def prepare_model(self, model: nn.Module, device_placement: bool | None = None, evaluation_mode: bool = False):
        if find_state(model) is None and (evaluation_mode or not _can_learn(model)):
            return super().prepare_model(model, device_placement, evaluation_mode=True)  # DDP refuses frozen models
        self._check([model])
        self._shard(model)
        simulated = find_sharded(model) is None
        return super().prepare_model(
            model,
            device_placement=device_placement if simulated else False,
            evaluation_mode=evaluation_mode or not simulated,  # not in DDP: the engine synchronizes
        )

    def prepare_optimizer(self, optimizer: torch.optim.Optimizer, device_placement: bool | None = None):
        if not getattr(optimizer, "_is_accelerate_prepared", False):
            models = [m for m in self._models if find_sharded(m) is not None]
            if models and model_of(optimizer) is None:
                agree_on_options([optimizer])
                repoint(optimizer, models[-1])
        prepared = super().prepare_optimizer(optimizer, device_placement=device_placement)
        if model_of(_inner(prepared)) is not None and not isinstance(prepared, VotingOptimizer):
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
        for cursor in cursors:
            cursor.start(0 if self.sync_gradients else cursor.micro_batch + 1)

    def clip_grad_norm_(self, parameters, max_norm, norm_type=2):
        """Norm of the full averaged gradient of all workers, which is clipped to ``max_norm``. Collective."""
        parameters = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        if not self._has_sharded_model():
            return super().clip_grad_norm_(parameters, max_norm, norm_type)
        self.unscale_gradients()
        norm = clip_grad_norm(parameters, max_norm, norm_type)
        self._watch.saw_norm(norm, parameters)
        return norm

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

    def save_state(self, output_dir=None, safe_serialization: bool = True, **save_model_func_kwargs):
        """As ``Accelerator.save_state``, into a folder that is whole or not there (see ``checkpoint/folder.py``).

        It has the full model as a standard checkpoint, optimizer state in the canonical layout, and what Accelerate
        saves. Collective.

        Raises: SDPStateError on every worker when any of them cannot write; earlier checkpoints stay.
        """
        if not self._has_sharded_model():
            return super().save_state(output_dir, safe_serialization, **save_model_func_kwargs)
        model = self._only_model()
        automatic = self.project_configuration.automatic_checkpoint_naming
        if automatic:
            output_dir = os.path.join(self.project_dir, "checkpoints", f"checkpoint_{self.save_iteration}")
            if from_rank_0(lambda: size_of(output_dir), control_group(model)) is not None:
                raise ValueError(
                    f"{output_dir} already exists. Set project_configuration.iteration to the next number."
                )
        iteration = self.project_configuration.iteration
        try:
            with checkpoint.writing(output_dir, model) as unfinished:
                save_pretrained(model, unfinished)
                for index, optimizer in enumerate(self._optimizers):
                    folder = unfinished / _numbered(OPTIMIZER, index)
                    with together(control_group(model)):
                        folder.mkdir(exist_ok=True)
                    save_optimizer(optimizer, model, folder)
                with self._without_model(), _explicit_folder(self.project_configuration):
                    super().save_state(str(unfinished), safe_serialization)
        except BaseException:
            self.project_configuration.iteration = iteration  # some workers have counted it
            raise
        with together(control_group(model)):
            if automatic and self.project_configuration.total_limit is not None and self.is_main_process:
                for old in _automatic_folders(self.project_dir)[: -self.project_configuration.total_limit]:
                    shutil.rmtree(old)
        return output_dir

    def load_state(self, input_dir=None, load_kwargs=None, **load_model_func_kwargs):
        """As ``Accelerator.load_state``, from a folder that :meth:`save_state` or a plain Accelerator wrote.

        The world and the plan may be others than those that wrote it. Collective.

        Raises: on every worker, before anything is changed: SDPStateError when the folder is incomplete or damaged or
            of another optimizer, SDPConfigError when it is of another model, may not be read, or is not seen by all.
        """
        if not self._has_sharded_model():
            return super().load_state(input_dir, load_kwargs, **load_model_func_kwargs)
        model = self._only_model()
        group = control_group(model)
        if input_dir is None and self.project_configuration.automatic_checkpoint_naming:
            folders = from_rank_0(lambda: _automatic_folders(self.project_dir), group)
            input_dir = folders[-1] if folders else None
        if input_dir is None:
            raise ValueError("No input_dir was given, and there is no automatically named checkpoint.")
        come_to(model, "load_state")
        from_rank_0(lambda: checkpoint.finish_interrupted(Path(input_dir)), group)
        check_together(input_dir, group=group)
        input_dir = Compared(input_dir)
        saved = [open_optimizer_state(optimizer, model, input_dir, i) for i, optimizer in enumerate(self._optimizers)]
        from_rank_0(lambda: self._check_rest(Path(input_dir)), group)
        load_weights(model, input_dir)
        for optimizer, its_state in zip(self._optimizers, saved, strict=True):
            load_optimizer(optimizer, model, its_state)
        tell_changes(model, input_dir, self.num_processes, self.process_index)
        with self._without_model():
            return super().load_state(str(input_dir), load_kwargs, **load_model_func_kwargs)

    def _check_rest(self, folder: Path) -> None:
        """Raises SDPStateError that names what the folder lacks of all that is neither model nor optimizer."""
        wanted = [_numbered(SCHEDULER_NAME, i) + ".bin" for i in range(len(self._schedulers))]
        wanted += [SCALER_NAME] if self.scaler is not None else []
        missing = [name for name in wanted if size_of(folder / name) is None]
        if missing:
            raise SDPStateError(f"{folder} is incomplete: {missing[0]} is missing.")
        found = len([*folder.glob("custom_checkpoint_*.pkl")])
        if found != len(self._custom_objects):
            raise SDPStateError(
                f"{folder} has the state of {found} registered objects, this accelerator has "
                f"{len(self._custom_objects)}. Register the same ones (register_for_checkpointing), in their order."
            )

    @contextlib.contextmanager
    def _without_model(self):
        """Schedulers, dataloaders, scaler, random numbers and registered objects only."""
        kept = self._models, self._optimizers
        self._models, self._optimizers = [], []
        try:
            yield
        finally:
            self._models, self._optimizers = kept

    def _only_model(self) -> nn.Module:
        models = [m for m in self._models if find_state(m) is not None]  # others are not trained
        if len(models) > 1:
            names = [type(unwrap(m)).__name__ for m in models]
            raise SDPStateError(f"save_state and load_state handle one SDP model, this accelerator has {names}.")
        return models[0]

    def free_memory(self, *objects):
        for model in self._models:
            if find_state(model) is not None:
                reset_after_exception(unwrap(model))  # a step that ran out of memory is tried again
        return super().free_memory(*objects)

    def end_training(self):
        super().end_training()
        if not torch.distributed.is_initialized():
            end_groups()

    def _has_sharded_model(self) -> bool:
        return any(find_sharded(m) is not None for m in self._models)

    def _check(self, models: list[nn.Module]) -> None:
        """Of models that can learn."""
        if not models:
            return
        refuse_other_engines(self.distributed_type)
        if getattr(self, "parallelism_config", None) is not None:
            raise SDPConfigError("ParallelismConfig is set, but an SDP model is sharded by hf_sdp. Remove it.")
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.num_processes:
            raise SDPConfigError(
                f"WORLD_SIZE={launched} workers were launched, but Accelerate runs with {self.num_processes}. "
                "Launch with a file of configs/accelerate/ (on CPU: ACCELERATE_USE_CPU=true)."
            )
        for model in models:
            state = find_state(model)
            if state is not None and self.sdp_config not in (None, state.held.config):
                raise SDPConfigError(
                    f"The model was patched with {state.held.config}, the accelerator has {self.sdp_config}."
                )
        unpatched = [model for model in models if find_state(model) is None]
        if unpatched:
            self._check_unpatched(unpatched[0], {*models, *filter(find_state, self._models)} - {unpatched[0]})

    def _check_unpatched(self, model: nn.Module, others: set[nn.Module]) -> None:
        name = type(model).__name__
        if self.sdp_config is None:
            raise SDPConfigError(
                f"{name} is not patched. Call patch_model(model, SDPConfig(...)) before prepare, or use "
                f"SDPAccelerator(sdp_config=SDPConfig(...)). {_NOT_TRAINED}"
            )
        if others:
            names = ", ".join(sorted(unwrap(other)._get_name() for other in others))
            raise SDPConfigError(
                f"{name} is not patched, and sdp_config is for one model that learns: there is also {names}. "
                f"{_NOT_TRAINED} Where SDP trains several models, call patch_model on each."
            )
        if self.num_processes == 1 and not self.sdp_config.simulate:
            raise SDPConfigError("SDP needs at least 2 workers, this world has 1. Use a file of configs/accelerate/.")

    def _refuse_optimizer_without_model(self, optimizer: torch.optim.Optimizer) -> None:
        """Prepared before its model it would go on with parameters that are no longer the model's; of a model that was
        left to Accelerate it would train without SDP."""
        raise SDPConfigError(
            f"{type(optimizer).__name__} is prepared without a model that SDP trains. Prepare it with its model, or "
            "after it."
        )

    def _shard(self, model: nn.Module) -> None:
        if find_state(model) is None:
            assert self.sdp_config is not None  # _check has refused the model without it
            patch_model(model, self.sdp_config)
        shard(model, self.device)


def refuse_other_engines(distributed_type: DistributedType) -> None:
    """Raises SDPConfigError when FSDP, DeepSpeed or another engine is configured."""
    flag = next((name for flag, name in _FLAGS.items() if parse_flag_from_env(flag)), None)
    other = _OTHER_ENGINES.get(distributed_type) or flag
    if other is not None:
        raise SDPConfigError(
            f"{other} is configured, but an SDP model is sharded by hf_sdp. Remove it from the accelerate config (or "
            "TrainingArguments); SDPConfig(sharding='full') is FSDP2 among the holders."
        )


def _can_learn(model: nn.Module) -> bool:
    """A patched model belongs to SDP even when all of it is frozen."""
    return find_state(model) is not None or any(p.requires_grad for p in model.parameters())


def _inner(optimizer):
    return getattr(optimizer, "optimizer", optimizer)


def _numbered(name: str, index: int) -> str:
    return f"{name}_{index}" if index else name


def _automatic_folders(project_dir: str) -> list[Path]:
    """Oldest first."""
    found = {}
    for path in Path(project_dir, "checkpoints").glob("checkpoint_*"):
        if match := re.fullmatch(r"checkpoint_(\d+)", path.name):
            found[int(match[1])] = path
    return [path for _, path in sorted(found.items())]


@contextlib.contextmanager
def _explicit_folder(configuration):
    automatic, configuration.automatic_checkpoint_naming = configuration.automatic_checkpoint_naming, False
    try:
        yield
    finally:
        configuration.automatic_checkpoint_naming = automatic
