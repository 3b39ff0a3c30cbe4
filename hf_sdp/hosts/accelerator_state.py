"""``save_state`` and ``load_state`` of an Accelerator whose model is sharded by SDP.

Source: accelerate/accelerator.py (save_state, load_state).
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.constants import SCALER_NAME, SCHEDULER_NAME
from torch import nn

from ..checkpoint import folder as checkpoint
from ..checkpoint.files import size_of
from ..checkpoint.load import load_weights, open_optimizer_state, tell_changes
from ..checkpoint.marker import OPTIMIZER, Compared, check_together
from ..checkpoint.optimizer_state import load_optimizer, save_optimizer
from ..checkpoint.save import save_pretrained
from ..engine.presence import come_to
from ..engine.sharded import control_group, find_sharded
from ..errors import SDPStateError
from ..model.state import find_state, unwrap
from ..world.agreement import from_rank_0, together


class SavesState(Accelerator):
    """The part of ``SDPAccelerator`` that saves and loads."""

    # The base class's.
    _models: list[nn.Module]
    _optimizers: list[torch.optim.Optimizer]

    def _has_sharded_model(self) -> bool:
        return any(find_sharded(m) is not None for m in self._models)

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
