"""``hf-sdp verify``: is a folder a whole and consistent checkpoint?"""

import json
import math
from collections import Counter
from pathlib import Path

import click
from rich.table import Table
from torch import nn

from ..checkpoint import tensors as boxes
from ..checkpoint.marker import MARKER, OPTIMIZER, PLAN, check, config_of_plan
from ..checkpoint.saved_optimizer import TENSORS
from ..checkpoint.weights import INDEX, Weights
from ..compat import converts_checkpoints
from ..errors import SDPConfigError, SDPStateError
from ..plan.plan import Plan
from .errors import CommandError
from .models import first_line, load_config, make_meta_model
from .tables import console, short, short_bytes


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--contents/--no-contents", default=True, help="Read every file and compare its CRC-32; or sizes only.")
def verify(folder: Path, contents: bool) -> None:
    """Check a checkpoint FOLDER: complete, shapes, plan, hashes.

    A standard folder without hf_sdp's files is checked as far as it can be. Exit code 2 and the file's name when
    something is missing, damaged or does not fit together.
    """
    try:
        if not folder.is_dir():
            raise CommandError(f"{folder} is no folder.")
        rows = _checked(folder, contents)
    except OSError as error:
        raise CommandError(f"{folder} cannot be read: {error.strerror or error}") from error
    table = Table(title=f"{folder}: no fault found", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console().print(table)


def _checked(folder: Path, contents: bool) -> dict[str, str]:
    """What was checked -> what was found. Raises: SDPStateError, SDPConfigError or CommandError at the first fault."""
    try:
        marker = check(folder, contents=contents)
        rows = _files(marker, contents)
    except (KeyError, TypeError, AttributeError) as error:
        raise SDPStateError(f"{folder / MARKER} is damaged: {error!r}.") from error
    if not (folder / "config.json").is_file():
        raise CommandError(f"{folder} is no checkpoint: it has no config.json.")
    model = _model(folder)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    rows["weights"] = _weights(folder, model, shapes)
    if marker is not None:
        rows["plan"] = _plan(folder, marker, shapes)
        rows["optimizer"] = _optimizer(folder, shapes)
    return rows


def _files(marker: dict | None, contents: bool) -> dict[str, str]:
    if marker is None:
        return {"written by": f"not hf_sdp ({MARKER} is not there): no sizes or hashes to compare, no plan"}
    versions = ", ".join(f"{name} {version}" for name, version in marker["versions"].items())
    size = sum(file["bytes"] for file in marker["files"].values())
    found = "sizes and CRC-32 as written" if contents else "sizes as written (contents not compared)"
    return {
        "written by": f"{marker['world_size']} workers; {versions}",
        "files": f"{len(marker['files'])} files, {short_bytes(size)}: all there, {found}",
    }


def _model(folder: Path) -> nn.Module:
    return make_meta_model(load_config(str(folder)), str(folder))


def _weights(folder: Path, model: nn.Module, shapes: dict[str, tuple[int, ...]]) -> str:
    try:
        weights = Weights(folder)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise CommandError(f"{folder / INDEX} cannot be read: {error!r}.") from error
    for name in weights.files:
        if weights.shape(name) is None:
            raise CommandError(f"{weights.files[name]}: {name} is missing, {INDEX} says that it is there.")
    dtypes = Counter(str(weights.dtype(name)).removeprefix("torch.") for name in weights.files)
    found = f"{len(weights.files)} tensors ({', '.join(dtypes)}) in {len(set(weights.files.values()))} files"
    if converts_checkpoints(model):
        return f"{found}; shapes not compared: transformers converts checkpoints of {type(model).__name__}"
    weights.check(shapes)
    others = weights.files.keys() - dict(model.named_parameters(remove_duplicate=False)).keys()
    unknown = f"; {len(others)} that it does not have, e.g. {min(others)}" if others else ""
    numel = short(sum(math.prod(shape) for shape in shapes.values()))
    return f"{found}: the {numel} elements of {type(model).__name__} in the shapes of config.json{unknown}"


def _plan(folder: Path, marker: dict, shapes: dict[str, tuple[int, ...]]) -> str:
    """The plan must be of this model, of the SDPConfig in the marker, and whole in itself."""
    file = folder / PLAN
    try:
        plan = Plan.from_json(file.read_text())
        found_hash = plan.hash
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise SDPStateError(f"{file} cannot be read as a plan: {error!r}.") from error
    try:
        config = config_of_plan(marker)
    except (TypeError, IndexError, SDPConfigError) as error:
        raise SDPStateError(f"{folder / MARKER} is damaged: {error!r}.") from error
    expected = {
        "plan_hash": (found_hash, marker["plan_hash"]),
        "level": (plan.level, config.level),
        "masking": (plan.masking, config.masking),
        "num_subnetworks": (plan.num_subnetworks, config.num_subnetworks or marker["world_size"]),
    }
    for what, (found, said) in expected.items():
        if found != said:
            raise SDPStateError(f"{file}: {what} is {found}, {MARKER} says {said}.")
    for name in {**plan.shapes, **shapes}:
        if plan.shapes.get(name) != shapes.get(name):
            raise SDPStateError(
                f"{file}: {name} has shape {plan.shapes.get(name)}, the model of config.json has {shapes.get(name)}."
            )
    for module in plan.modules:
        units = plan.unit_holders[module.name]
        if len(units) != module.num_units or not all(h and set(h) <= set(plan.everyone) for h in units):
            raise SDPStateError(
                f"{file}: {module.name} has {module.num_units} units, of which each must have holders in "
                f"0..{plan.num_subnetworks - 1}."
            )
    return (
        f"{plan.num_subnetworks} subnetworks, {plan.level} level, {plan.masking} masking, coverage "
        f"{plan.coverage:.4g}: fits the model and the SDPConfig; hash {plan.hash[:12]}"
    )


def _optimizer(folder: Path, shapes: dict[str, tuple[int, ...]]) -> str:
    """Every tensor ``parameter/key`` has its parameter's shape, and every parameter with state has the same keys."""
    place = folder / OPTIMIZER / TENSORS
    if not place.is_dir():
        return "none saved"
    try:
        stored = boxes.stored(place)
    except Exception as error:  # a damaged pickle raises anything
        raise SDPStateError(f"{place}/.metadata cannot be read: {first_line(error)}") from error
    for name, (shape, _) in stored.items():
        parameter = name.rpartition("/")[0]
        if shapes.get(parameter) != shape:
            raise SDPStateError(f"{place}: {name} has shape {shape}, {parameter} has {shapes.get(parameter)}.")
    keys = sorted({name.rpartition("/")[2] for name in stored})
    return f"{len(stored)} tensors ({', '.join(keys) or 'no state'}), each of its parameter's shape"
