"""What ``trainer.install`` puts under the Trainer's saving and resuming. Source: transformers/trainer.py.

Every wrap leaves a Trainer whose model is not sharded by SDP to the host, but for resuming from a checkpoint that SDP
wrote. Names and signatures are those of the methods they wrap; ``install`` compares them.
"""

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import transformers.trainer as host
from torch import nn

from ..checkpoint import folder as checkpoint
from ..checkpoint.files import read_json, size_of
from ..checkpoint.load import (
    check_config,
    check_weights,
    find_optimizer_state,
    load_weights,
    open_optimizer_state,
    tell_changes,
)
from ..checkpoint.marker import MARKER, OPTIMIZER, Compared, check_together
from ..checkpoint.optimizer_state import load_optimizer, save_optimizer
from ..checkpoint.save import save_pretrained, weights_to_save
from ..engine.sharded import find_sharded, get_sharded
from ..errors import SDPConfigError, SDPStateError
from ..model.state import find_state, unwrap
from ..world.agreement import from_rank_0, launched_workers, process_group_is_up, together

_ALL_ARE_HERE = "_sdp_all_are_here"


@dataclass
class KeptWeights:
    """What is saved of a model, on the CPU of rank 0 (empty on others), as it was at ``version`` of the weights.

    ``checksum``: of what this worker stores.
    """

    version: int
    checksum: int
    weights: dict[str, torch.Tensor]


_kept: WeakKeyDictionary[nn.Module, KeptWeights] = WeakKeyDictionary()
"""Model -> what :func:`keep_weights` has put together."""


def keep_weights(model: nn.Module) -> None:
    """Put what is saved of a model on the CPU of rank 0, where the Trainer may then save alone. Collective."""
    sharded = get_sharded(model, "Keeping the weights")
    weights = weights_to_save(model)
    _kept[unwrap(model)] = KeptWeights(sharded.run.version, sharded.checksum(), {} if weights is None else weights)


def let_go_of_weights(model: nn.Module) -> None:
    """Free what :func:`keep_weights` has put together."""
    _kept.pop(unwrap(model), None)


def kept_weights(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """What is kept, unless weights have changed since; then None.

    Callbacks may have written into parameters after the training (averaged weights that are swapped in).
    """
    kept, sharded = _kept.get(unwrap(model)), get_sharded(model, "Saving")
    if kept is None or (kept.version, kept.checksum) != (sharded.run.version, sharded.checksum()):
        return None
    return kept.weights


def _save(original):
    def _save(self, output_dir=None, state_dict=None):
        sharded = find_sharded(self.model)
        if sharded is None or state_dict is not None:
            return original(self, output_dir, state_dict)
        # After training rank 0 has the weights, and may be here alone; but for a checkpoint all workers come.
        kept = kept_weights(self.model)
        if kept is not None and not hasattr(self, _ALL_ARE_HERE):
            if not self.args.should_save:
                return
            # A copy: the host empties the dict it is given.
            return original(self, output_dir, dict(kept))
        if sharded.roll_call is not None and not self.is_in_train:  # who saves on rank 0 alone hears of the remedy
            sharded.roll_call.wait("saving weights that rank 0 has not kept (see SDPCallback(keep_weights_gib=...))")
        save_pretrained(self.model, output_dir if output_dir is not None else self.args.output_dir)
        with together(sharded.control_group), _without_weights(self.model):
            if self.args.should_save:
                original(self, output_dir, {})

    return _save


@contextlib.contextmanager
def _without_weights(model):
    """The rest of ``_save`` (tokenizer, arguments), with weights and configs already there."""
    save = model.save_pretrained
    model.save_pretrained = lambda *args, **kwargs: None
    try:
        yield
    finally:
        model.save_pretrained = save


def _save_checkpoint(original):
    def _save_checkpoint(self, model, trial):
        sharded = find_sharded(self.model)
        if sharded is None:
            return original(self, model, trial)
        run_dir = self._get_output_dir(trial=trial)
        folder = Path(run_dir, f"{host.PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        best = self.state.best_model_checkpoint
        try:
            with checkpoint.writing(folder, self.model) as unfinished:
                with _redirected(self, unfinished):
                    original(self, model, trial)
                # The host has looked for the best one where this one is being written.
                best_step = self.state.best_global_step
                best_folder = os.path.join(run_dir, f"{host.PREFIX_CHECKPOINT_DIR}-{best_step}")
                self.state.best_model_checkpoint = best
                if best_step == self.state.global_step or (
                    best_step and from_rank_0(lambda: os.path.isdir(best_folder), sharded.control_group)
                ):
                    self.state.best_model_checkpoint = best_folder
                if self.args.should_save:
                    self.state.save_to_json(str(unfinished / host.TRAINER_STATE_NAME))
        except BaseException:
            self.state.best_model_checkpoint = best
            raise
        with together(sharded.control_group):
            if self.args.push_to_hub:
                self._push_from_checkpoint(str(folder))
            if self.args.should_save:  # only now: the new checkpoint is complete
                host.rotate_checkpoints(
                    output_dir=run_dir,
                    save_total_limit=self.args.save_total_limit,
                    best_model_checkpoint=self.state.best_model_checkpoint,
                    use_mtime=True,
                )

    return _save_checkpoint


@contextlib.contextmanager
def _redirected(trainer, unfinished: Path):
    """The host writes its checkpoint to ``unfinished``, rotates nothing and pushes nothing."""
    trainer._get_output_dir = lambda trial: str(unfinished.parent)
    trainer._push_from_checkpoint = lambda folder: None
    setattr(trainer, _ALL_ARE_HERE, True)
    try:
        yield
    finally:
        del trainer._get_output_dir, trainer._push_from_checkpoint
        delattr(trainer, _ALL_ARE_HERE)


def _save_optimizer_and_scheduler(original):
    def _save_optimizer_and_scheduler(self, output_dir):
        sharded = find_sharded(self.model)
        if sharded is None:
            return original(self, output_dir)
        folder = Path(output_dir)
        with together(sharded.control_group):
            if sharded.held.rank == 0:
                (folder / OPTIMIZER).mkdir(parents=True, exist_ok=True)
        save_optimizer(self.optimizer, self.model, folder / OPTIMIZER)
        with together(sharded.control_group):
            if sharded.held.rank == 0:
                # Without hf_sdp the Trainer fails here ("different number of parameter groups"), instead of going on
                # with a fresh optimizer.
                torch.save({"state": {}, "param_groups": []}, folder / host.OPTIMIZER_NAME)
                torch.save(self.lr_scheduler.state_dict(), folder / host.SCHEDULER_NAME)

    return _save_optimizer_and_scheduler


def _load_from_checkpoint(original):
    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        folder, state = Path(resume_from_checkpoint), find_state(self.model)
        plain = state is None or state.held.simulated
        from_rank_0(lambda: checkpoint.finish_interrupted(folder))
        check_together(resume_from_checkpoint)
        if plain and state is not None:
            from_rank_0(lambda: check_config(self.model, folder))
        if plain:
            return original(self, resume_from_checkpoint, model)
        if not self.is_in_train:
            return load_weights(self.model, Compared(folder))
        # The Trainer comes here first, and makes its optimizer later: until all is known to fit, nothing is loaded.
        from_rank_0(lambda: find_optimizer_state(folder))
        from_rank_0(lambda: _check_trainer_state(folder / host.TRAINER_STATE_NAME))
        check_weights(self.model, Compared(folder))

    return _load_from_checkpoint


def _check_trainer_state(file: Path) -> None:
    """Raises: SDPStateError that names the file when it is missing, or is not what the Trainer reads next."""
    content = read_json(file)
    step = content.get("global_step") if isinstance(content, dict) else None
    if not isinstance(step, int):
        raise SDPStateError(f"{file} is damaged: its global_step is {step!r}.")


def _load_optimizer_and_scheduler(original):
    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not _ours(self, checkpoint):
            return original(self, checkpoint)
        folder, sharded = Compared(checkpoint), find_sharded(self.model)  # compared in _load_from_checkpoint
        saved = open_optimizer_state(self.optimizer, self.model, folder)
        with together():
            schedule = torch.load(os.path.join(checkpoint, host.SCHEDULER_NAME), weights_only=True)
        if sharded is not None:
            load_weights(self.model, folder)
        load_optimizer(self.optimizer, self.model, saved)
        with together():
            self.lr_scheduler.load_state_dict(schedule)
        tell_changes(self.model, checkpoint, self.args.world_size, self.args.process_index)

    return _load_optimizer_and_scheduler


def _ours(trainer, folder: str) -> bool:
    return find_sharded(trainer.model) is not None or from_rank_0(lambda: size_of(Path(folder, OPTIMIZER))) is not None


def _run_epoch(original):
    def _run_epoch(self, model, epoch, **rest):
        # Killed after its last checkpoint, a run is restarted from there: the host would take one step more.
        if find_sharded(self.model) is not None and self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        original(self, model, epoch, **rest)

    return _run_epoch


def _load_best_model(original):
    def _load_best_model(self):
        if find_sharded(self.model) is None:
            return original(self)
        load_weights(self.model, self.state.best_model_checkpoint)

    return _load_best_model


def last_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest checkpoint of a Trainer's ``output_dir`` that is complete and undamaged; None when there is none.

    For ``trainer.train(resume_from_checkpoint=last_checkpoint(args.output_dir))``, which begins in the first life of a
    run and continues in each later one. Collective: call it on all workers, once ``TrainingArguments`` are made. Rank 0
    finishes what a kill interrupted, and every checksum is compared.

    Raises: on every worker: SDPConfigError when some worker may not read the newest checkpoint or does not see it.
        SDPStateError when other workers were launched and there is no process group yet.
    """
    launched = launched_workers()
    if launched > 1 and not process_group_is_up():
        raise SDPStateError(
            f"last_checkpoint is a collective of the {launched} workers, which have no process group yet: make "
            "TrainingArguments first."
        )
    from_rank_0(lambda: checkpoint.finish_all_interrupted(output_dir))
    return checkpoint.newest_complete(output_dir)


def refuse_to_overwrite(output_dir: str | os.PathLike) -> None:
    """For a run that starts at step 0 and will save. Collective.

    Raises: SDPConfigError on every worker when ``output_dir`` has checkpoints of SDP of an earlier run.
    """
    names = from_rank_0(
        lambda: [n for n in checkpoint.checkpoints_of(output_dir) if size_of(Path(output_dir, n, MARKER)) is not None]
    )
    if names:
        raise SDPConfigError(
            f"{output_dir} has {', '.join(reversed(names))} of an earlier run, and this run starts at step 0: it would "
            "overwrite them. To continue: "
            "trainer.train(resume_from_checkpoint=hf_sdp.last_checkpoint(args.output_dir)). To start anew: another "
            "output_dir, or remove them."
        )


WRAPS = {
    "_save": _save,
    "_save_checkpoint": _save_checkpoint,
    "_save_optimizer_and_scheduler": _save_optimizer_and_scheduler,
    "_load_from_checkpoint": _load_from_checkpoint,
    "_load_optimizer_and_scheduler": _load_optimizer_and_scheduler,
    "_run_epoch": _run_epoch,
    "_load_best_model": _load_best_model,
}
"""Trainer method -> its wrap."""
