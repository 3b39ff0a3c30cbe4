"""Checkpoint folders: whole or not there, and clear about what they are.

A checkpoint is a standard Hugging Face folder with the full model's weights, and beside them:

    sdp_checkpoint.json   written last: that the folder is complete, every file's size and CRC-32, the SDPConfig, the
                          world, and versions
    sdp_plan.json         the plan that trained it
    sdp_optimizer/        optimizer state in the canonical layout (optimizer_state.py)

It is written into a folder beside its place, _unfinished-<name>, and renamed when all workers are done. All workers see
one file system.
"""

import contextlib
import functools
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from ..engine.presence import come_to
from ..engine.sharded import get_sharded
from ..errors import SDPStateError
from ..model.state import get_state
from ..world.agreement import from_rank_0, together
from .files import size_of
from .marker import MARKER, Compared, check, check_together, seal
from .one_file_system import refuse_unless_shared

_UNFINISHED = "_unfinished-"  # uploads to the Hub leave out "_*"
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(folder: str | os.PathLike, model: nn.Module) -> Iterator[Path]:
    """``with writing(folder, model) as unfinished: ...`` fills ``unfinished``. It then takes the place of ``folder``.

    Collective: all workers run the block; what fails on one of them is an error on all, and leaves ``folder`` and all
    other checkpoints as they were. Raises SDPStateError when some worker does not come, SDPConfigError before the block
    when some workers do not see the folder that rank 0 has made.
    """
    sharded, folder = get_sharded(model, "Saving a checkpoint"), Path(folder)
    held, group = sharded.held, sharded.control_group
    come_to(model, "saving a checkpoint")
    unfinished = _place_of(folder)
    with together(group):
        if held.rank == 0:
            finish_interrupted(folder)
            unfinished.mkdir(parents=True)
    try:
        refuse_unless_shared(unfinished.parent, group)
        with together(group):
            yield unfinished
        seal(unfinished, get_state(model), group)
        with together(group):
            if held.rank == 0:
                _take_place(unfinished, folder)
    except BaseException:
        if held.rank == 0:
            give_up(folder)
        raise


def _place_of(folder: Path) -> Path:
    """Where ``folder`` is written: below one that hosts take for none of theirs, under the same name."""
    return folder.parent / f"{_UNFINISHED}{folder.name}" / folder.name


def _replaced(unfinished: Path) -> Path:
    """What has been in the place of ``unfinished`` before, while it is being renamed."""
    return unfinished.parent / "replaced"


def _take_place(unfinished: Path, folder: Path) -> None:
    """Rename. After a kill or an error anywhere in here, :func:`finish_interrupted` or :func:`give_up` goes on."""
    if folder.exists():
        os.rename(folder, _replaced(unfinished))
    os.rename(unfinished, folder)
    _bring_along(_replaced(unfinished), folder)
    shutil.rmtree(unfinished.parent)


def _bring_along(replaced: Path, folder: Path) -> None:
    """Move what ``replaced`` had beside a checkpoint (logs, ...)."""
    try:
        marker = check(replaced, only=None)
    except SDPStateError:  # a damaged checkpoint: replaced as a whole
        return
    ours = {MARKER, *(file.split("/")[0] for file in marker["files"])} if marker else set()
    for entry in list(replaced.iterdir()) if replaced.is_dir() else ():
        if entry.name not in ours and not (folder / entry.name).exists():
            os.rename(entry, folder / entry.name)


def finish_interrupted(folder: Path) -> None:
    """After a kill: let a complete checkpoint take its place, and remove one that is not. One process only."""
    unfinished = _place_of(folder)
    try:
        complete = unfinished.is_dir() and check(unfinished) is not None
    except SDPStateError:
        complete = False
    if complete:
        _take_place(unfinished, folder)
    elif unfinished.parent.is_dir():
        if _replaced(unfinished).is_dir():
            if folder.exists():
                _bring_along(_replaced(unfinished), folder)
            else:
                os.rename(_replaced(unfinished), folder)
        shutil.rmtree(unfinished.parent)


def give_up(folder: Path) -> None:
    """After an error: remove what was being written; what it had replaced comes back. Raises nothing of its own."""
    with contextlib.suppress(OSError):
        shutil.rmtree(_place_of(folder), ignore_errors=True)
        finish_interrupted(folder)


def finish_all_interrupted(output_dir: str | os.PathLike) -> None:
    """The same for all checkpoints of a Trainer's ``output_dir``."""
    for parent in Path(output_dir).glob(f"{_UNFINISHED}checkpoint-*"):
        finish_interrupted(parent.parent / parent.name.removeprefix(_UNFINISHED))


def checkpoints_of(output_dir: str | os.PathLike) -> list[str]:
    """The names ``checkpoint-<step>`` of the folders in a Trainer's ``output_dir``, highest step first."""
    found = {}
    for path in Path(output_dir).iterdir() if Path(output_dir).is_dir() else ():
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path.name
    return [name for _, name in sorted(found.items(), reverse=True)]


def newest_complete(output_dir: str | os.PathLike) -> str | None:
    """The ``checkpoint-<step>`` of the highest step that is complete and undamaged; warns of others. Collective.

    Raises: SDPConfigError on every worker, and nothing older is taken, when some worker has no permission or does not
        see what rank 0 sees.
    """
    for name in from_rank_0(lambda: checkpoints_of(output_dir)):
        folder = os.path.join(output_dir, name)
        try:
            if check_together(folder) is None:
                from_rank_0(functools.partial(_check_plain, folder))
            return Compared(folder)
        except SDPStateError as error:
            logger.warning("Not resuming from %s: %s", name, error)
    return None


def _check_plain(folder: str) -> None:
    if size_of(os.path.join(folder, "trainer_state.json")) is None:  # a plain Trainer writes it last
        raise SDPStateError(f"{folder} is incomplete: trainer_state.json is missing.")
