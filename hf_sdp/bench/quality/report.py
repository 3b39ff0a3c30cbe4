"""Tables of results: mean and spread over seeds of the full model's final evaluation loss."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from .names import sorted_runs
from .plots import plot_curves, plot_final
from .results import Results
from .sweep import at_best_rates, warnings

REFERENCE = "data-parallel"


@dataclass(frozen=True)
class Row:
    """One method. Losses in nats per token; FLOPs relative to data parallel (of the same seeds' runs).

    Attributes:
        final: final evaluation loss by seed.
        differences: final loss minus data parallel's of the same seed, for the seeds that both have.
        learning_rate: None in files that do not say.
        best_scale: of the residual branches of the full model, and the loss with it; None where it was not looked at.
    """

    method: str
    parameters: float
    steps: float
    relative_step_flops: float | None
    relative_flops: float | None
    final: dict[str, float]
    differences: list[float]
    learning_rate: float | None
    best_scale: tuple[float, float] | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.final.values())


def rows(results: Results) -> list[Row]:
    """A row for every method, in the order of ``FAMILIES``."""
    runs_of = sorted_runs(at_best_rates(results.runs))
    reference = runs_of.get(REFERENCE, {})
    whole = next(iter(reference.values()), None)
    found = []
    for method, runs in runs_of.items():
        first = next(iter(runs.values()))
        final = {seed: runs[seed]["curve"][-1][1] for seed in sorted(runs, key=int)}
        found.append(
            Row(
                method=method,
                parameters=first["parameters"],
                steps=first["steps"],
                relative_step_flops=first["step_flops"] / whole["step_flops"] if whole else None,
                relative_flops=_flops(first) / _flops(whole) if whole else None,
                final=final,
                differences=[
                    loss - reference[seed]["curve"][-1][1] for seed, loss in final.items() if seed in reference
                ],
                learning_rate=first.get("learning_rate"),
                best_scale=best_scale(list(runs.values())),
            )
        )
    return found


def best_scale(runs: list[dict]) -> tuple[float, float] | None:
    """The scale with the lowest loss, mean over seeds, and that loss."""
    if not all("scaled" in run for run in runs):
        return None
    losses = {1.0: statistics.mean(run["curve"][-1][1] for run in runs)}
    losses |= {float(scale): statistics.mean(run["scaled"][scale] for run in runs) for scale in runs[0]["scaled"]}
    best = min(losses, key=lambda scale: losses[scale])
    return best, losses[best]


def _flops(run: dict) -> float:
    return run["steps"] * run["step_flops"]


HEADER = (
    "method",
    "parameters a worker",
    "FLOPs a step",
    "steps",
    "FLOPs",
    "seeds",
    "loss: mean ± sd",
    "min to max",
    "minus data parallel: mean ± sd",
    "learning rate",
    "best scale of branches: loss",
)
SHOWN = ("method", "steps", "seeds", "loss: mean ± sd", "minus data parallel: mean ± sd")


def cells(row: Row) -> tuple[str, ...]:
    """The texts of a table row, by ``HEADER``. sd: sample standard deviation over seeds."""
    share = "-" if row.relative_step_flops is None else f"{row.relative_step_flops:.3f}"
    whole = "-" if row.relative_flops is None else f"{row.relative_flops:.3f}"
    losses = list(row.final.values())
    return (
        row.method,
        f"{row.parameters:,.0f}",
        share,
        f"{row.steps:,}",
        whole,
        f"{len(losses)}",
        mean_and_spread(losses),
        f"{min(losses):.3f} to {max(losses):.3f}",
        mean_and_spread(row.differences, "+") if row.differences and row.method != REFERENCE else "-",
        "-" if row.learning_rate is None else f"{row.learning_rate:g}",
        "-" if row.best_scale is None else f"{row.best_scale[0]:g}: {row.best_scale[1]:.3f}",
    )


def mean_and_spread(values: list[float], sign: str = "") -> str:
    """``sign``: "+" writes that of a positive mean."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.3f}{spread}"


def show(results: Results) -> None:
    """The columns of the table that fit into a terminal of 80 characters."""
    table = Table(
        title="final evaluation loss of the full model (nats per token)", title_justify="left", box=box.SIMPLE
    )
    shown = {HEADER.index(name): name.replace("data parallel: mean", "DP") for name in HEADER if name in SHOWN}
    for name in shown.values():
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows(results):
        texts = cells(row)
        table.add_row(*(texts[index] for index in shown))
    console = Console()
    console.print(table)
    for warning in warnings(results.runs):
        console.print(warning, style="bold red")


def markdown(results: Results) -> str:
    lines = ["| " + " | ".join(HEADER) + " |", "| --- " + "| ---: " * (len(HEADER) - 1) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows(results)]
    lines += [f"\n**{warning}**" for warning in warnings(results.runs)]
    return "\n".join([*lines, *_of_all_rates(results.runs)]) + "\n"


def _of_all_rates(runs: dict[str, dict[str, dict]]) -> list[str]:
    """Lines of a table of every final loss, seed by seed; none where no method has a learning rate of its own."""
    rates = sorted({float(rate) for name in runs if (rate := name.partition("/")[2])})
    if not rates:
        return []
    lines = [f"\n| final losses by learning rate | {' | '.join(f'{rate:g}' for rate in rates)} |"]
    lines.append("| --- " * (len(rates) + 1) + "|")
    for method in sorted_runs(at_best_rates(runs)):
        by_rate = (runs.get(f"{method}/{rate:g}", {}) for rate in rates)
        final = ([f"{seeds[seed]['curve'][-1][1]:.3f}" for seed in sorted(seeds, key=int)] for seeds in by_rate)
        lines.append(f"| {method} | {' | '.join(map(', '.join, final))} |")
    return lines


def write_report(results: Results) -> list[Path]:
    """``table.md``, ``curves.png`` and ``final.png`` beside the results file."""
    folder = results.path.parent
    table = folder / "table.md"
    table.write_text(markdown(results), encoding="utf-8")
    plot_curves(sorted_runs(at_best_rates(results.runs)), folder / "curves.png", reference=REFERENCE)
    plot_final(
        {row.method: list(row.final.values()) for row in rows(results)}, folder / "final.png", reference=REFERENCE
    )
    return [table, folder / "curves.png", folder / "final.png"]
