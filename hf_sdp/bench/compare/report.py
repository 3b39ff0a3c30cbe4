"""The results of a comparison as tables: Markdown, CSV, JSON, and for the terminal."""

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

import torch

from ...estimate.names import DDP, FSDP2
from .run import UNLIMITED

REFERENCES = (DDP, FSDP2)
"""Engines that the others are divided by, where they were measured."""
MIB, PARTS = 2**20, ("forward_s", "backward_s", "exposed_s", "optimizer_s")
_NOTES = (
    "Memory: what is stored (buckets: DDP's, beside the gradients), and the peak of all that is allocated during a "
    "step. Sent: for parameters and gradients, as a ring sends it. Figures are those of the worker with the most.",
    "Step: median of {rounds} interleaved rounds, in each the slowest worker (smallest and largest round). Forward, "
    "backward, optimizer (with clipping): medians of the same step without communication; exposed: what the step takes "
    "longer with it. CPU: processor time of all workers together.",
    "On the wire: what the interface of the worker that sends most has carried in a step, headers included. (gloo's "
    "reduce-scatter is an all-reduce inside and sends twice what a ring sends.)",
)


class Table(NamedTuple):
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join([f"## {self.title}\n", *(f"| {' | '.join(line)} |" for line in lines), "", self.note]).rstrip()


def about() -> dict:
    """Where and with what a comparison runs: date (UTC), commit if there is one, versions, hardware."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=False).stdout.strip() or None
    except OSError:
        commit = None
    cpus = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.partition(":")[2].strip() for line in cpus if line.startswith("model name")), platform.machine())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "commit": commit,
        "versions": {
            "Python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("hf_sdp", "torch", "transformers", "accelerate")},
        },
        "hardware": f"{os.cpu_count()} cores of {cpu}; " + (", ".join(gpus) if gpus else "no GPU"),
    }


def tables(result: dict) -> list[Table]:
    """Memory and traffic; step times for every bandwidth; losses if there are any. Of what has been measured so far."""
    made = [_memory(result["memory"])] if result["memory"] else []
    made += [_times(bandwidth, rows) for bandwidth, rows in result["times"].items()]
    if result["losses"]:
        made.append(_losses(result["losses"]))
    return made


def _memory(rows: dict[str, dict]) -> Table:
    kinds = ["parameters", "gradients", "optimizer", "buckets", "peak"]
    references = [name for name in REFERENCES if name in rows]
    columns = ["engine", *kinds[:-1], "peak", *(f"peak / {r}'s" for r in references), "GFLOP"]
    lines = [
        [
            name,
            *(f"{row[kind] / MIB:.1f}" for kind in kinds),
            *(f"{row['peak'] / rows[r]['peak']:.2f}" for r in references),
            f"{row['flops'] / 1e9:.1f}",
            f"{row['bytes_sent'] / MIB:.1f}",
            str(row["num_collectives"]),
        ]
        for name, row in rows.items()
    ]
    title = "Memory (MiB), computation and traffic of a step, by worker"
    return Table(title, [*columns, "MiB sent", "collectives"], lines, _NOTES[0])


def _times(bandwidth: str, rows: dict[str, dict]) -> Table:
    references = [name for name in REFERENCES if name in rows]
    on_wire = all("wire_bytes" in row for row in rows.values())
    columns = ["engine", "step, ms (range)", *(f"/ {r}'s" for r in references)]
    columns += ["forward", "backward", "exposed", "optimizer", "CPU, ms", *(["MiB on the wire"] if on_wire else [])]
    lines = []
    for name, row in rows.items():
        low, high = row["range_s"]
        lines.append([name, f"{1e3 * row['step_s']:.0f} ({1e3 * low:.0f}-{1e3 * high:.0f})"])
        lines[-1] += [f"{row['step_s'] / rows[r]['step_s']:.2f}" for r in references]
        lines[-1] += [f"{1e3 * row[part]:.0f}" for part in (*PARTS, "cpu_s")]
        lines[-1] += [f"{row['wire_bytes'] / MIB:.1f}"] if on_wire else []
    note = _NOTES[1].format(rounds=len(next(iter(rows.values()))["steps_s"])) + (f" {_NOTES[2]}" if on_wire else "")
    return Table(_times_title(bandwidth), columns, lines, note)


def _times_title(bandwidth: str) -> str:
    where = "no limit of bandwidth" if bandwidth == UNLIMITED else f"every worker's link limited to {bandwidth}"
    return f"Time of a step, ms: {where}"


def _losses(found: dict) -> Table:
    curves = found["curves"]
    steps = next(iter(curves.values()))["step"]
    shown = sorted({round(i * (len(steps) - 1) / 5) for i in range(6)})
    lines = [
        [name, *(f"{curve['evaluation'][i]:.3f}" for i in shown), ", ".join(curve["engines"][1:]) or "-"]
        for name, curve in curves.items()
    ]
    columns = ["engine", *(f"step {steps[i]}" for i in shown), "the same mathematics"]
    return Table(f"Evaluation loss of the full model: {found['corpus']}", columns, lines)


def flat_rows(result: dict) -> list[dict]:
    """One row for every engine and bandwidth, in bytes and seconds."""
    rows = []
    for bandwidth, times in result["times"].items():
        for name, row in times.items():
            low, high = row["range_s"]
            rows.append({"engine": name, "bandwidth": bandwidth, **result["memory"][name], "step_s": row["step_s"]})
            rows[-1] |= {"step_min_s": low, "step_max_s": high, **{part: row[part] for part in (*PARTS, "cpu_s")}}
            rows[-1] |= {"wire_bytes": row.get("wire_bytes", "")}
    return rows


def write(result: dict, folder: Path) -> None:
    """``comparison.json``, ``comparison.md`` and ``comparison.csv`` in ``folder``, of what has been measured so far."""
    (folder / "comparison.json").write_text(json.dumps(result, indent=1) + "\n")
    facts = result["about"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    head = [
        "# Comparison\n",
        f"    {result['command']}\n",
        f"{facts['date']}; {facts['hardware']}; {versions}"
        + (f"; commit {facts['commit']}" if facts["commit"] else "")
        + ".",
        result["what"],
    ]
    text = "\n".join(head) + "\n\n" + "\n\n".join(table.markdown() for table in tables(result)) + "\n"
    (folder / "comparison.md").write_text(text)
    rows = flat_rows(result)
    if rows:
        with open(folder / "comparison.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
