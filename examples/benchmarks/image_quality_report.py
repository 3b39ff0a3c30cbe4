"""Table and plot of image_quality.py: accuracy and loss of the full model, with and without recalibrated statistics."""

import statistics
from pathlib import Path

import matplotlib

from hf_sdp.bench.quality import Results, sorted_runs
from hf_sdp.bench.quality.plots import COLORS, GRAY
from hf_sdp.bench.quality.report import REFERENCE, Row, mean_and_spread, rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ACCURACY, LOSS = "eval_accuracy", "curve"
RECALIBRATED_ACCURACY, RECALIBRATED_LOSS = "eval_recalibrated_accuracy", "eval_recalibrated_loss"
"""Where a run has the curves of the full model; the latter are empty where nothing was recalibrated."""

HEADER = (
    "method", "parameters a worker", "FLOPs a step", "steps", "FLOPs", "seeds", "accuracy", "loss",
    "accuracy, recalibrated", "loss, recalibrated", "accuracy minus data parallel", "loss minus data parallel",
)  # fmt: skip

Runs = dict[str, dict]
"""Those of a method, by seed."""


def final(runs: Runs, metric: str) -> dict[str, float]:
    return {seed: run[metric][-1][1] for seed, run in runs.items() if run[metric]}


def best(runs: Runs, metric: str, recalibrated: str) -> dict[str, float]:
    """With recalibrated statistics, where there are such."""
    return final(runs, recalibrated) or final(runs, metric)


def cells(row: Row, runs: Runs, reference: Runs) -> tuple[str, ...]:
    """The texts of a row, by ``HEADER``; differences are of the same seed."""

    def cell(metric: str) -> str:
        values = final(runs, metric)
        return mean_and_spread(list(values.values())) if values else "-"

    def difference(metric: str, recalibrated: str) -> str:
        of_reference = final(reference, metric)
        pairs = [
            (x, of_reference[seed]) for seed, x in best(runs, metric, recalibrated).items() if seed in of_reference
        ]
        return mean_and_spread([x - y for x, y in pairs], "+") if pairs and runs is not reference else "-"

    return (
        row.method, f"{row.parameters:,.0f}", f"{row.relative_step_flops or 0:.3f}", f"{row.steps}",
        f"{row.relative_flops or 0:.3f}", f"{len(runs)}", cell(ACCURACY), cell(LOSS), cell(RECALIBRATED_ACCURACY),
        cell(RECALIBRATED_LOSS), difference(ACCURACY, RECALIBRATED_ACCURACY), difference(LOSS, RECALIBRATED_LOSS),
    )  # fmt: skip


def table(results: Results) -> str:
    """Markdown; ±: standard deviation over seeds."""
    reference = results.runs.get(REFERENCE, {})
    lines = ["| " + " | ".join(HEADER) + " |", "| --- " + "| ---: " * (len(HEADER) - 1) + "|"]
    lines += ["| " + " | ".join(cells(row, results.runs[row.method], reference)) + " |" for row in rows(results)]
    return "\n".join(lines) + "\n"


def plot(results: Results, path: Path) -> None:
    """Final accuracy: a dot for each seed, a bar for the mean; hollow where the statistics are those of subnetworks."""
    methods = list(reversed(sorted_runs(results.runs).items()))
    figure, axis = plt.subplots(figsize=(7.2, 1.2 + 0.27 * len(methods)), dpi=130)
    for place, (method, runs) in enumerate(methods):
        color = GRAY if method == REFERENCE else COLORS[1] if method.startswith("small") else COLORS[0]
        as_trained = list(final(runs, ACCURACY).values()) if final(runs, RECALIBRATED_ACCURACY) else []
        axis.plot(as_trained, [place] * len(as_trained), "o", ms=4, mfc="none", color=color, alpha=0.6)
        shown = list(best(runs, ACCURACY, RECALIBRATED_ACCURACY).values())
        axis.plot(shown, [place] * len(shown), "o", ms=4, color=color, alpha=0.7, mew=0)
        axis.plot([statistics.mean(shown)], [place], "|", ms=13, mew=2, color=color)
        if method == REFERENCE:
            axis.axvspan(min(shown), max(shown), color=GRAY, alpha=0.15, lw=0)
    axis.set_yticks(range(len(methods)), [method for method, _ in methods], fontsize=8)
    axis.set_xlabel("final accuracy of the full model (hollow: statistics not recalibrated)")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def write_report(results: Results) -> str:
    """``table.md`` and ``final.png`` beside the results file. Returns: the table."""
    text = table(results)
    results.path.with_name("table.md").write_text(text, encoding="utf-8")
    plot(results, results.path.with_name("final.png"))
    return text
