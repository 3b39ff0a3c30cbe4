"""``sdp_checkpoint.json``, the marker of a complete checkpoint: written last, compared before anything is loaded."""

import dataclasses
import json
import os
import zlib
from pathlib import Path

import torch.distributed as dist

from ..compat import versions
from ..config import SDPConfig
from ..errors import SDPStateError
from ..model.state import SDPState
from ..plan.plan import Plan
from ..workload import Workload
from ..world.agreement import from_rank_0, of_everyone, process_group_is_up, together
from .files import read_json, reading, size_of
from .one_file_system import refuse_unless_seen

MARKER, PLAN, OPTIMIZER = "sdp_checkpoint.json", "sdp_plan.json", "sdp_optimizer"


class Compared(str):
    """The path of a checkpoint whose checksums have just been compared: :func:`check_together` compares sizes only."""


def seal(folder: Path, state: SDPState, group: dist.ProcessGroup | None) -> None:
    """Write the plan, and last the marker. Collective: every worker reads its share of the files back."""
    held = state.held
    with together(group):
        if held.rank == 0:
            (folder / PLAN).write_text(held.plan.to_json() + "\n")
    mine: dict[str, dict] = {}
    with together(group):
        found = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    # What a worker has written it sees itself; a listing elsewhere may lag behind.
    files = sorted(set().union(*of_everyone(found, group)))
    with together(group):
        for file in files[held.rank :: held.world_size]:
            mine[file] = fingerprint(folder / file)
    everyone = of_everyone(mine, group)
    with together(group):
        if held.rank == 0:
            content = {
                "world_size": held.world_size,
                "sdp_config": dataclasses.asdict(state.config),
                **({} if state.schedule is None else {"phase": state.schedule.number}),
                "plan_hash": held.plan.hash,
                "versions": versions(),
                "files": {file: found[file] for found in everyone for file in sorted(found)},
            }
            with open(folder / f".{MARKER}", "w") as marker:
                marker.write(json.dumps(content, indent=1) + "\n")
                marker.flush()
                os.fsync(marker.fileno())
            os.replace(folder / f".{MARKER}", folder / MARKER)  # it is there whole, or not at all


def fingerprint(file: Path) -> dict:
    """Size and CRC-32: against damage, not against forgery, and several times as fast as a cryptographic hash."""
    crc = 0
    with open(file, "rb") as opened:
        while block := opened.read(2**20):
            crc = zlib.crc32(block, crc)
        return {"bytes": opened.tell(), "crc32": f"{crc:08x}"}


def check(folder: str | os.PathLike, *, only: str | None = "", contents: bool = False) -> dict | None:
    """The content of the marker of a complete checkpoint; None for a folder that SDP did not write.

    Args:
        only: files whose names start so ("model": the weights); None: none of them.
        contents: also compare CRC-32.
    Raises: SDPStateError that names the file that is missing, cut short or, with ``contents``, has changed;
        SDPConfigError for a file that this process has no permission to read.
    """
    folder, content = Path(folder), read_marker(Path(folder))
    if content is not None and only is not None:
        files = _chosen(content, only)
        _check_sizes(folder, files)
        if contents:
            _check_contents(folder, files)
    return content


def check_together(folder: str | os.PathLike, *, only: str = "", group: dist.ProcessGroup | None = None) -> dict | None:
    """As :func:`check` with ``contents``, each worker a share of the files. Which files these are is read by rank 0.
    Collective.

    Raises: on every worker, as :func:`check`; SDPConfigError also when some workers do not see what rank 0 sees.
    """
    content = from_rank_0(lambda: check(folder, only=only), group)
    if content is None:
        return None
    files = _chosen(content, only)
    refuse_unless_seen(lambda: _check_sizes(Path(folder), files), folder, group)
    if not isinstance(folder, Compared):
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if process_group_is_up() else (0, 1)
        with together(group):
            _check_contents(Path(folder), dict(sorted(files.items())[rank::world_size]))
    return content


def _chosen(content: dict, only: str) -> dict[str, dict]:
    return {file: expected for file, expected in content["files"].items() if file.startswith(only)}


def _check_sizes(folder: Path, files: dict[str, dict]) -> None:
    for file, expected in files.items():
        size = size_of(folder / file)
        if size is None:
            raise SDPStateError(f"{folder} is incomplete: {file} is missing.")
        if size != expected["bytes"]:
            raise SDPStateError(
                f"{folder} is damaged: {file} has {size} bytes, it was written with {expected['bytes']}."
            )


def _check_contents(folder: Path, files: dict[str, dict]) -> None:
    for file, expected in files.items():
        try:
            with reading(folder / file):
                found = fingerprint(folder / file)
        except FileNotFoundError as error:
            raise SDPStateError(f"{folder} is incomplete: {file} is missing.") from error
        if found != expected:
            raise SDPStateError(f"{folder} is damaged: the content of {file} has changed since it was written.")


def read_marker(folder: Path) -> dict | None:
    """The marker's content; None for a folder that SDP did not write.

    Raises: SDPStateError when it is missing beside other files of SDP, is damaged, or names files outside the folder;
        SDPConfigError without permission.
    """
    file = folder / MARKER
    if size_of(file) is None:
        if size_of(folder / OPTIMIZER) is not None or size_of(folder / PLAN) is not None:
            raise SDPStateError(f"{folder} is incomplete: it has no {MARKER}, which is written last.")
        return None
    content = read_json(file)
    kinds = {"files": dict, "world_size": int, "sdp_config": dict, "plan_hash": str, "versions": dict}
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise SDPStateError(f"{file} is damaged: {key!r} is missing, or no {kind.__name__}.")
    phases = content["sdp_config"].get("coverage_schedule")
    if phases is not None and content.get("phase") not in range(len(phases)):
        raise SDPStateError(f"{file} is damaged: it is of phase {content.get('phase')!r} of {len(phases)}.")
    for name, entry in content["files"].items():
        if not is_inside(name):
            raise SDPStateError(f"{file} names {name!r}, which is no file of the folder.")
        if not isinstance(entry, dict) or not isinstance(entry.get("bytes"), int) or "crc32" not in entry:
            raise SDPStateError(f"{file} is damaged: {name!r} has no size and CRC-32.")
    return content


def config_of_plan(content: dict) -> SDPConfig:
    """The config by which a checkpoint's plan was made: with a schedule, that of the phase.

    Raises: TypeError or SDPConfigError for what is no SDPConfig, IndexError for a phase that it does not have.
    """
    known = {field.name for field in dataclasses.fields(SDPConfig)}  # a later version may have more options
    given = {name: value for name, value in content["sdp_config"].items() if name in known}
    if given.get("workload") is not None:
        given["workload"] = Workload(**given["workload"])
    return SDPConfig(**given).phases[content.get("phase", 0)][1]


def is_inside(name: str) -> bool:
    """Whether a path that a file of a checkpoint gives is one inside of the checkpoint's folder."""
    return bool(name) and not os.path.isabs(name) and ".." not in Path(name).parts


def changes(saved: dict | None, state: SDPState | None, world_size: int) -> list[str]:
    """What is different from the run that wrote the checkpoint, for the user."""
    if saved is None:
        return ["the checkpoint was written without SDP"] if state is not None else []
    result = []
    if saved["world_size"] != world_size:
        result.append(
            f"{saved['world_size']} workers then, {world_size} now: other data per worker, and random numbers anew on "
            "workers that are new"
        )
    if state is None:
        return [*result, "this run is not SDP"]
    now, default = _as_saved(state.config), _as_saved(SDPConfig())
    for name, value in (default | saved["sdp_config"]).items():  # an earlier version had fewer options
        if name in now and now[name] != value:
            result.append(f"{name}={value!r} then, {now[name]!r} now")
    result += [
        f"{name} {then} then, {versions()[name]} now"
        for name, then in saved["versions"].items()
        if versions().get(name) != then
    ]
    if not result and saved["plan_hash"] != _plan_then(saved, state).hash:
        result.append("another plan")
    return result


def phase_of_schedule(saved: dict | None, config: SDPConfig) -> int | None:
    """Number of the phase that a checkpoint is of, if its run had the ``coverage_schedule`` of ``config``."""
    phases = None if saved is None else saved["sdp_config"].get("coverage_schedule")
    return saved["phase"] if saved is not None and phases == _as_saved(config)["coverage_schedule"] else None


def _as_saved(config: SDPConfig) -> dict:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _plan_then(saved: dict, state: SDPState) -> Plan:
    """That of the same phase of the same schedule."""
    return state.held.plan if state.schedule is None else state.schedule.phases[saved["phase"]].plan
