"""The support table as a page and on the screen."""

import re
from collections.abc import Iterable, Sequence

from .models import TASKS
from .table import COLUMNS, MASKINGS, NOT_TRIED, Row

HEADER = ("model type", "task", *COLUMNS, "notes")

_TOP = """# Which models work

Every model type of transformers {version} that has a model for one of these tasks, at a tiny size: {tasks}.
Made by `hf-sdp models{options} --output SUPPORT.md`.

For each, two subnetworks of two are compared with the dense model without what they do not hold: the loss and all
gradients, under forward and under backward masking, and so are the two virtual workers of a simulation. "yes": all of
them agree. "forward only": they do under forward masking. "not tried": no tiny model of it could be made here. Numbers
in brackets: [why](#why-not). Models that take images as well are given text alone: what sees images is held by all
workers.

- sub-blocks: `level="block"`. Attention, MLP, experts and mixers are units.
- layers: `level="block", block_granularity="layer"`.
- neurons: `level="neuron"`.
- notes: what is in a layer and held by all workers nevertheless.
"""
_WHY = """## Why not

"not found": the layers, or their residual blocks, in a recording of the model; [FAMILIES.md](FAMILIES.md) says what can
be said of it. Other reasons begin with the name of a module, or with what a model raised.
"""


def _outcome(row: Row, column: str) -> tuple[str, str]:
    """What works, and why the rest does not; of two reasons that of forward masking."""
    reasons = row.reasons[column]
    working = [masking for masking in MASKINGS if not reasons[masking]]
    if len(working) == len(MASKINGS):
        return "yes", ""
    if working:
        return f"{working[0]} only", next(filter(None, reasons.values()))
    if reasons["forward"].startswith(NOT_TRIED):
        return "not tried", reasons["forward"].removeprefix(NOT_TRIED)
    return "no", reasons["forward"]


def cell(row: Row, column: str) -> str:
    """What works, with the reason."""
    works, why = _outcome(row, column)
    return f"{works}: {why}" if why else works


class _Footnotes:
    """Each reason once: it is numbered where it comes first."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str, why: str) -> str:
        return f"{text} [{self.numbers.setdefault(why, len(self.numbers) + 1)}]" if why else text

    def cells(self, row: Row) -> tuple[str, ...]:
        of_columns = (self(*_outcome(row, column)) for column in COLUMNS)
        return row.model_type, row.task, *of_columns, _HELD.sub(lambda held: self(held[1], held[2]), row.notes)


_HELD = re.compile(r"(all hold [^:]+): (.*?)(?=; all hold |; neurons: |$)")
"""Of notes: what all workers hold, and why."""


def cells(row: Row) -> tuple[str, ...]:
    return (row.model_type, row.task, *(cell(row, column) for column in COLUMNS), row.notes)


def ordered(rows: Iterable[Row], tasks: Sequence[str]) -> list[Row]:
    return sorted(rows, key=lambda row: (tasks.index(row.task), row.model_type))


def counts(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """For each task, and for all: its types, and how many of them work in each column; with a header."""
    result = [("task", "types", "not tried", *COLUMNS)]
    for task in (*dict.fromkeys(row.task for row in rows), "all"):
        own = [row for row in rows if task in (row.task, "all")]
        works = (sum(all(row.works(c, m) for m in MASKINGS) for row in own) for c in COLUMNS)
        result.append((task, str(len(own)), str(sum(row.not_tried for row in own)), *map(str, works)))
    return result


def markdown(rows: Sequence[Row], version: str) -> str:
    """``version``: of transformers."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    options = "" if len(tasks) == len(TASKS) else "".join(f' --task "{task}"' for task in tasks)
    top = _TOP.format(version=version, tasks=", ".join(tasks), options=options)
    footnotes = _Footnotes()
    types = _table([HEADER, *map(footnotes.cells, rows)])
    reasons = [f"{number}. {_escaped(why)}" for why, number in footnotes.numbers.items()]
    return "\n".join([top, *types, "", "## How many work", "", *_table(counts(rows)), "", _WHY, *reasons, ""])


def _table(lines: Sequence[Sequence[str]]) -> list[str]:
    header, *others = lines
    return [_line(header), _line(["---"] * len(header)), *map(_line, others)]


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escaped, texts)) + " |"


def _escaped(text: str) -> str:
    """``layers.*`` is no emphasis, and a bar no cell."""
    return text.replace("|", "\\|").replace("*", "\\*")
