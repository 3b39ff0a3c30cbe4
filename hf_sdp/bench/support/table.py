"""The support table: each model type is tried in a process of its own, so that none can end the run."""

import contextlib
import os
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from ..workers import context

COLUMNS = {
    "sub-blocks": dict(level="block"),
    "layers": dict(level="block", block_granularity="layer"),
    "neurons": dict(level="neuron"),
}
"""Column -> options of SDPConfig."""
MASKINGS = ("forward", "backward")
MOST_NUMEL = 100e6
"""Elements of a model that is still tried."""
NOT_TRIED = "not tried: "
"""Begins the reason of what says nothing of hf_sdp."""


@dataclass
class Row:
    """Of one model type and task.

    Attributes:
        reasons: column -> masking -> why it does not work; "" where it works.
        notes: what all workers hold, though it is in a layer.
        numel: elements of the tiny model.
        seconds: that it took.
    """

    model_type: str
    task: str
    reasons: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: str = ""
    numel: int = 0
    seconds: float = 0.0

    @property
    def not_tried(self) -> bool:
        return all(reason.startswith(NOT_TRIED) for of_one in self.reasons.values() for reason in of_one.values())

    def works(self, column: str, masking: str) -> bool:
        return self.reasons[column][masking] == ""


def without(row: Row, reason: str) -> Row:
    """Nothing works in what has no reason yet."""
    for column in COLUMNS:
        row.reasons.setdefault(column, {})
        for masking in MASKINGS:
            row.reasons[column].setdefault(masking, reason)
    return row


def tried(model_type: str, task: str) -> Row:
    """One row, in this process."""
    import torch

    from ...config import SDPConfig
    from .check import check, learn
    from .models import made, tiny_batch, tiny_model
    from .tiny import tiny_config

    row, begin = Row(model_type, task), time.monotonic()
    try:
        config = tiny_config(model_type)
        with contextlib.suppress(Exception), torch.device("meta"):  # some can only be made with memory
            row.numel = sum(p.numel() for p in made(config, task).parameters())
        if row.numel > MOST_NUMEL:
            return without(row, f"{NOT_TRIED}{row.numel / 1e6:.0f} M parameters at the smallest sizes known here")
        model = tiny_model(config, task)
        loss = learn(model, tiny_batch(model, task=task)).loss
        if not torch.isfinite(loss):
            return without(row, f"{NOT_TRIED}the loss of a tiny model is {loss}")
    except Exception as error:  # whatever the class says
        return without(row, f"{NOT_TRIED}no tiny model ({reason_of(error)})")
    for column, options in COLUMNS.items():
        row.reasons[column] = {}
        for masking in MASKINGS:
            try:
                check(config, task, SDPConfig(**options, masking=masking))  # type: ignore[arg-type]
                row.reasons[column][masking] = ""
            except Exception as error:
                row.reasons[column][masking] = reason_of(error)
    row.notes = _notes(model)
    row.seconds = time.monotonic() - begin
    return row


def reason_of(error: Exception) -> str:
    """In a few words. What computes something wrong begins with "wrong"."""
    from ...errors import SDPConfigError
    from .check import Differs

    text = " ".join(str(error).split())
    if isinstance(error, Differs):
        return f"wrong: {text}"
    if isinstance(error, SDPConfigError):
        for pattern, short in _REFUSALS:
            if found := re.search(pattern, text):
                return short.format(*found.groups())[:160].strip(" .:")
        return text[:160]
    return f"fails: {type(error).__name__}: {text[:120]}"


_REFUSALS = (
    (r"cannot be found: on the meta device it raises (.*?)\.* hf_sdp\.register_family", "not found: {}"),
    (r"has no stack of layers", "no stack of layers is found"),
    (r"Nothing in .* can be held in part at [^:]*: (.*?)(?: Use level=.*)?$", "{}"),
    (r"coverage=\S+ of (.*) is less than one unit per worker", "too few: {}"),
)
"""Pattern of a message -> in a few words."""


def _notes(model) -> str:
    """What is in the layers and cannot be left out, or cut."""
    from ...families import cuts_of, structure_of

    try:
        structure, cuts = structure_of(model), cuts_of(model)
    except Exception:
        return ""
    inside = {name: p.numel() for name, p in model.named_parameters() if name.startswith(_below(structure.layers))}
    of_blocks = _below(m for block in structure.blocks for m in block.modules)
    held = sum(numel for name, numel in inside.items() if not name.startswith(of_blocks))
    notes = []
    if structure.blocks and inside and held > 0.02 * sum(inside.values()):
        notes.append(f"{held / sum(inside.values()):.0%} of the layers is in no block")
    kept: dict[str, dict[str, int]] = {}
    for name, why in structure.kept.items():
        of_one = kept.setdefault(without_name(why, name), Counter())
        of_one[_alike(name)] += 1
    for why, names in list(kept.items())[:_MOST_NOTES]:
        which = ", ".join(f"{name} ({number})" for name, number in list(names.items())[:_MOST_NOTES])
        notes.append(f"all hold {which}: {_alike(why)[:120]}")
    cut_kinds = {cut.kind for of_block in cuts.values() if not isinstance(of_block, str) for cut in of_block}
    whole = dict.fromkeys(block.kind for block in structure.blocks if isinstance(cuts[block.main], str))
    if cut_kinds and whole:
        notes.append(f"neurons: {', '.join(whole)} held whole{' in some layers' if set(whole) <= cut_kinds else ''}")
    return "; ".join(notes)


_MOST_NOTES = 3


def without_name(why: str, name: str) -> str:
    """A reason that stands behind the name of what it is the reason of."""
    return why.removeprefix(name).replace(name, "it").strip(" .:")


def _below(names) -> tuple[str, ...]:
    return tuple(f"{name}." for name in names)


def _alike(text: str) -> str:
    """Layers are mostly alike: ``layers.*`` for each of them."""
    return re.sub(r"\.\d+(?=\.|\b)", ".*", text)


def rows(wanted: Sequence[tuple[str, str]], *, processes: int = 2, limit_s: float = 240.0) -> Iterator[Row]:
    """The rows of these (model type, task), as they are done."""
    waiting = list(wanted)
    running: dict[Connection, tuple[Any, Row, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                own, others = context().Pipe()
                process = context().Process(target=_answer, args=(others, *waiting[0]), daemon=True)
                process.start()
                others.close()
                running[own] = (process, Row(*waiting.pop(0)), time.monotonic() + limit_s)
            first = min(deadline for _, _, deadline in running.values())
            for own in wait(list(running), timeout=max(0.0, first - time.monotonic())):
                assert isinstance(own, Connection)
                process, row, _ = running.pop(own)
                try:
                    yield own.recv()
                except EOFError:
                    process.join()
                    yield without(row, f"fails: its process ended with {process.exitcode}")
            for own, (process, row, deadline) in list(running.items()):
                if time.monotonic() > deadline:
                    process.kill()
                    del running[own]
                    yield without(row, f"{NOT_TRIED}it took longer than {limit_s:g} s")
    finally:
        for process, *_ in running.values():
            process.kill()


def _answer(connection: Connection, model_type: str, task: str) -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), sys.stderr.fileno())  # model types tell of their defaults
        row = tried(model_type, task)
    connection.send(row)
