"""``hf-sdp models``: which model types work."""

import dataclasses
import json
import sys
from pathlib import Path

import click
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from ..bench.support.models import TASKS
from ..bench.support.page import HEADER, cells, counts, markdown, ordered
from ..bench.support.table import Row, rows
from .errors import CommandError
from .options import PositiveNumber
from .tables import console


@click.command()
@click.argument("types", nargs=-1, metavar="[TYPE]...")
@click.option("--task", "tasks", type=click.Choice(list(TASKS)), multiple=True, help="Only these. All by default.")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="Write a Markdown page.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
@click.option("--processes", type=click.IntRange(1, 256), default=2, help="Types that are tried at the same time.")
@click.option("--limit", type=PositiveNumber(), default=240.0, help="Seconds for one type.")
def models(types, tasks, output, as_json, processes, limit) -> None:
    """Which model types of transformers work, and why others do not.

    Each TYPE (llama, t5, ...; all by default) is tried at a tiny size: two subnetworks, at block level (sub-blocks,
    layers) and at neuron level, with both maskings, are compared with the dense model without what they do not hold.
    All types of all tasks take about three quarters of an hour; --task chooses some of them.
    """
    wanted = _wanted(types, tasks or list(TASKS))
    if output is not None and not output.absolute().parent.is_dir():
        raise CommandError(f"--output {output}: {output.parent} is no folder.")
    found: list[Row] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        task = bars.add_task("model types", total=len(wanted))
        for row in rows(wanted, processes=processes, limit_s=limit):
            found.append(row)
            bars.advance(task)
    found = ordered(found, list(TASKS))
    if output is not None:
        output.write_text(markdown(found, transformers.__version__))
    if as_json:
        print(json.dumps([dataclasses.asdict(row) for row in found], indent=1))
    elif output is None:
        _print(found)
    else:
        _print_counts(found)


def _wanted(types: tuple[str, ...], tasks: list[str]) -> list[tuple[str, str]]:
    known = [(model_type, task) for task in tasks for model_type in TASKS[task][0]]
    for model_type in types:
        if model_type not in {name for name, _ in known}:
            raise CommandError(f"transformers {transformers.__version__} has no {model_type!r} for {', '.join(tasks)}.")
    return [(name, task) for name, task in known if not types or name in types]


def _print(found: list[Row]) -> None:
    table = Table(show_lines=True)
    for name in HEADER:
        table.add_column(name, overflow="fold")
    for row in found:
        table.add_row(*cells(row))
    console().print(table)
    _print_counts(found)


def _print_counts(found: list[Row]) -> None:
    header, *lines = counts(found)
    table = Table(*header, title="How many work")
    for line in lines:
        table.add_row(*line)
    console().print(table)
