"""The support table as a page and on the screen."""

from collections.abc import Iterable, Sequence

from .models import TASKS
from .table import COLUMNS, MASKINGS, Row

HEADER = ("model type", "task", *COLUMNS, "notes")

_TOP = """# Which models work

Every model type of transformers {version} that has a model for one of these tasks, at a tiny size: {tasks}.
Made by `hf-sdp models{options} --output SUPPORT.md`.

For each, two subnetworks of two are compared with the dense model without what they do not hold: the loss and all
gradients, under forward and under backward masking, and so are the two virtual workers of a simulation. "yes": all of
them agree. "forward only": they do under forward masking. All else says why not. "not tried": no tiny model of it could
be made here. Models that take images as well are given text alone: what sees images is held by all workers.

- sub-blocks: `level="block"`. Attention, MLP, experts and mixers are units.
- layers: `level="block", block_granularity="layer"`.
- neurons: `level="neuron"`.
- notes: what is in a layer and held by all workers nevertheless.
"""


def cell(row: Row, column: str) -> str:
    """ "yes", or in a few words what does not work."""
    reasons = {masking: row.reasons[column][masking] for masking in MASKINGS}
    failing = [masking for masking in MASKINGS if reasons[masking]]
    if not failing:
        return "yes"
    if len(failing) == 1:
        works = next(masking for masking in MASKINGS if masking not in failing)
        return f"{works} only ({failing[0]}: {reasons[failing[0]]})"
    return reasons["forward"]


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
    wide = [HEADER, *(cells(row) for row in rows)]
    return "\n".join([top, *_table(wide), "", "## How many work", "", *_table(counts(rows)), ""])


def _table(lines: Sequence[Sequence[str]]) -> list[str]:
    header, *others = lines
    return [_line(header), _line(["---"] * len(header)), *map(_line, others)]


def _line(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in texts) + " |"
