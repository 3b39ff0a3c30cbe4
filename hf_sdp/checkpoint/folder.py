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
import dataclasses
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist
from torch import nn

from ..compat import versions
from ..engine.sharded import get_sharded
from ..errors import SDPStateError
from ..model.state import Held
from ..world.agreement import together

MARKER, PLAN, OPTIMIZER = "sdp_checkpoint.json", "sdp_plan.json", "sdp_optimizer"
_UNFINISHED = "_unfinished-"  # uploads to the Hub leave out "_*"
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(folder: str | os.PathLike, model: nn.Module) -> Iterator[Path]:
    """``with writing(folder, model) as unfinished: ...`` fills ``unfinished``. It then takes the place of ``folder``.

    Collective: all workers run the block; what fails on one of them is an error on all, and leaves ``folder`` and all
    other checkpoints as they were. Raises SDPStateError when some worker does not come.
    """
    sharded, folder = get_sharded(model, "Saving a checkpoint"), Path(folder)
    held, group = sharded.held, sharded.control_group
    if sharded.roll_call is not None:
        sharded.roll_call.wait("saving a checkpoint")
    unfinished = _place_of(folder)
    with together(group):
        if held.rank == 0:
            finish_interrupted(folder)
            unfinished.mkdir(parents=True)
    try:
        with together(group):
            yield unfinished
        _seal(unfinished, held, group)
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


def _seal(folder: Path, held: Held, group: dist.ProcessGroup | None) -> None:
    """Write the plan, and last the marker. Collective: every worker reads its share of the files back."""
    with together(group):
        if held.rank == 0:
            (folder / PLAN).write_text(held.plan.to_json() + "\n")
    mine: dict[str, dict] = {}
    everyone: list = [None] * held.world_size
    with together(group):
        files = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        for file in files[held.rank :: held.world_size]:
            mine[file] = _fingerprint(folder / file)
    dist.all_gather_object(everyone, mine, group=group)
    with together(group):
        if held.rank == 0:
            content = {
                "world_size": held.world_size,
                "sdp_config": dataclasses.asdict(held.config),
                "plan_hash": held.plan.hash,
                "versions": versions(),
                "files": {file: found[file] for found in everyone for file in sorted(found)},
            }
            with open(folder / f".{MARKER}", "w") as marker:
                marker.write(json.dumps(content, indent=1) + "\n")
                marker.flush()
                os.fsync(marker.fileno())
            os.replace(folder / f".{MARKER}", folder / MARKER)  # it is there whole, or not at all


def _fingerprint(file: Path) -> dict:
    """Size and CRC-32: against damage, not against forgery, and several times as fast as a cryptographic hash."""
    crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            crc = zlib.crc32(block, crc)
    return {"bytes": file.stat().st_size, "crc32": f"{crc:08x}"}


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


def check(folder: str | os.PathLike, *, only: str | None = "", contents: bool = False) -> dict | None:
    """The content of the marker of a complete checkpoint; None for a folder that SDP did not write.

    Args:
        only: files whose names start so ("model": the weights); None: none of them.
        contents: also compare CRC-32.
    Raises: SDPStateError that names the file that is missing, cut short or, with ``contents``, has changed.
    """
    folder = Path(folder)
    if not (folder / MARKER).is_file():
        if (folder / OPTIMIZER).exists() or (folder / PLAN).exists():
            raise SDPStateError(f"{folder} is incomplete: it has no {MARKER}, which is written last.")
        return None
    try:
        content = json.loads((folder / MARKER).read_text())
        files = content["files"]
    except (ValueError, KeyError) as error:
        raise SDPStateError(f"{folder / MARKER} cannot be read: {error}.") from error
    for file, expected in files.items() if only is not None else ():
        if not file.startswith(only):
            continue
        if not (folder / file).is_file():
            raise SDPStateError(f"{folder} is incomplete: {file} is missing.")
        size = (folder / file).stat().st_size
        if size != expected["bytes"]:
            raise SDPStateError(
                f"{folder} is damaged: {file} has {size} bytes, it was written with {expected['bytes']}."
            )
        if contents and _fingerprint(folder / file) != expected:
            raise SDPStateError(f"{folder} is damaged: the content of {file} has changed since it was written.")
    return content


def newest_complete(output_dir: str | os.PathLike) -> str | None:
    """The ``checkpoint-<step>`` of the highest step that is complete, as ``transformers`` spells it.

    Warns of others.
    """
    found = {}
    for path in Path(output_dir).iterdir() if Path(output_dir).is_dir() else ():
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and path.is_dir():
            found[int(match[1])] = path
    for _, path in sorted(found.items(), reverse=True):
        try:
            if check(path) is None and not (path / "trainer_state.json").is_file():  # a plain Trainer writes it last
                raise SDPStateError(f"{path} is incomplete: trainer_state.json is missing.")
            return os.path.join(output_dir, path.name)
        except SDPStateError as error:
            logger.warning("Not resuming from %s: %s", path.name, error)
    return None


def changes(saved: dict | None, held: Held | None, world_size: int) -> list[str]:
    """What is different from the run that wrote the checkpoint, for the user."""
    if saved is None:
        return ["the checkpoint was written without SDP"] if held is not None else []
    result = []
    if saved["world_size"] != world_size:
        result.append(
            f"{saved['world_size']} workers then, {world_size} now: other data per worker, and random numbers anew on "
            "workers that are new"
        )
    if held is None:
        return [*result, "this run is not SDP"]
    now = json.loads(json.dumps(dataclasses.asdict(held.config)))  # lists, as they were saved
    for name, value in saved["sdp_config"].items():
        if name in now and now[name] != value:
            result.append(f"{name}={value!r} then, {now[name]!r} now")
    result += [
        f"{name} {then} then, {versions()[name]} now"
        for name, then in saved["versions"].items()
        if versions().get(name) != then
    ]
    if not result and saved["plan_hash"] != held.plan.hash:
        result.append("another plan")
    return result
