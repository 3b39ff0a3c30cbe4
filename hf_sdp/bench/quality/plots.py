"""Plots of results: loss over training FLOPs, and the final loss of every method."""

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from .results import flops_after  # noqa: E402

GRAY = "#444444"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito: told apart without red and green."""


def plot_curves(runs: dict[str, dict[str, dict]], path: Path, *, reference: str) -> None:
    """Evaluation loss of the full model over training FLOPs: a panel for each kind of method, each with ``reference``.

    Lines are means over seeds, bands reach from the lowest to the highest.
    Args:
        runs: method name -> seed -> run, as in ``Results.runs``.
    """
    whole = next(iter(runs.get(reference, next(iter(runs.values()))).values()))
    budget = whole["steps"] * whole["step_flops"]
    panels: dict[str, list[str]] = {}
    for method in runs:
        if method != reference:
            panels.setdefault(_panel(method), []).append(method)
    columns = min(3, max(1, len(panels)))
    lines = -(-len(panels) // columns) or 1
    most = 1 + max(map(len, panels.values()), default=0)  # lines of a legend
    figure, axes = plt.subplots(
        lines,
        columns,
        figsize=(0.6 + 4.2 * columns, (3.6 + 0.17 * most) * lines),
        dpi=130,
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis, (panel, methods) in zip(axes.flat, panels.items() or [(reference, [])], strict=False):
        if reference in runs:
            _band(axis, runs[reference], budget, GRAY, reference)
        for number, method in enumerate(methods):
            again, color = divmod(number, len(COLORS))
            _band(axis, runs[method], budget, COLORS[color], method, "--" if again else "-")
        axis.set_title(panel, loc="left", fontsize=10)
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)  # beside no curve
        axis.tick_params(labelbottom=True)
    for axis in axes.flat:
        _plain(axis)
    for axis in list(axes.flat)[len(panels) or 1 :]:
        axis.set_visible(False)
    figure.supxlabel("training FLOPs, relative to the whole data parallel run", fontsize=10)
    figure.supylabel("evaluation loss of the full model (nats per token)", fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def _panel(method: str) -> str:
    family = method.partition("@")[0]
    if not family.startswith(("forward", "backward")):
        return "baselines"
    if "+" in method:
        return "schedules"
    masking, level, *_ = family.split("-")
    return f"{masking} masking, {level} level"


def _band(axis, seeds: dict[str, dict], budget: float, color: str, label: str, line: str = "-") -> None:
    by_seed = [run["curve"] for run in seeds.values()]
    first = next(iter(seeds.values()))
    flops = [flops_after(first, step) / budget for step, _ in by_seed[0]]
    points = [[loss for _, loss in same] for same in zip(*by_seed, strict=True)]
    means = [statistics.mean(p) for p in points]
    axis.plot(flops, means, color=color, ls=line, marker="o", ms=2.5, lw=1.3, label=f"{label}: {means[-1]:.3f}")
    axis.fill_between(flops, [min(p) for p in points], [max(p) for p in points], color=color, alpha=0.2, lw=0)


def plot_final(final: dict[str, list[float]], path: Path, *, reference: str) -> None:
    """Final loss of every method, best mean on top: a dot for each seed, a bar for the mean.

    The band is ``reference``.
    """
    methods = sorted(final, key=lambda method: statistics.mean(final[method]), reverse=True)
    figure, axis = plt.subplots(figsize=(7.2, 1.2 + 0.27 * len(methods)), dpi=130)
    if reference in final:
        axis.axvspan(min(final[reference]), max(final[reference]), color=GRAY, alpha=0.15, lw=0)
    for place, method in enumerate(methods):
        color = GRAY if method == reference else COLORS[0] if _panel(method) != "baselines" else COLORS[1]
        axis.plot(final[method], [place] * len(final[method]), "o", ms=4, color=color, alpha=0.7, mew=0)
        axis.plot([statistics.mean(final[method])], [place], "|", ms=13, mew=2, color=color)
    axis.set_yticks(range(len(methods)), methods, fontsize=8)
    axis.set_xlabel("final evaluation loss of the full model (nats per token)")
    _plain(axis)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def _plain(axis) -> None:
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
