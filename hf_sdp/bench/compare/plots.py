"""Plots of a comparison (matplotlib, no display needed)."""

from pathlib import Path

from .report import MIB, PARTS
from .run import UNLIMITED

_COLORS = {"forward_s": "#4c78a8", "backward_s": "#72b7b2", "exposed_s": "#e45756", "optimizer_s": "#bab0ac"}
_LABELS = {"exposed_s": "exposed communication"}


def draw(result: dict, folder: Path) -> list[Path]:
    """Write memory.png, step_time.png, traffic.png and, with losses, loss.png; returns what was written."""
    written = [_memory(result["memory"], folder / "memory.png"), _traffic(result["memory"], folder / "traffic.png")]
    if result["times"]:
        written.append(_step_time(result["times"], folder / "step_time.png"))
    if result["losses"]:
        written.append(_losses(result["losses"], result["times"], folder / "loss.png"))
    return written


def _figure(num_panels: int, num_bars: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5.5 * num_panels + 1.5, max(3.0, 0.42 * num_bars + 1.4))
    figure, axes = pyplot.subplots(1, num_panels, figsize=size, sharey=True, squeeze=False)
    return figure, axes[0]


def _bars(axis, names: list[str], stacks: dict[str, list[float]], colors=None, totals=None) -> None:
    """Horizontal stacked bars, the first engine on top, with their totals (by default: their sums)."""
    left = [0.0] * len(names)
    for label, values in stacks.items():
        axis.barh(names, values, left=left, label=label, color=colors and colors[label], height=0.7)
        left = [a + b for a, b in zip(left, values, strict=True)]
    axis.set_ylim(len(names) - 0.5, -0.5)
    for y, (end, total) in enumerate(zip(left, totals or left, strict=True)):
        axis.text(end, y, f" {total:.0f}", va="center", fontsize=8)
    axis.margins(x=0.16)


def _save(figure, path: Path, legend_of=None) -> Path:
    """``legend_of``: the axis whose labels are explained, above all panels."""
    from matplotlib import pyplot

    if legend_of is not None:
        figure.legend(*legend_of.get_legend_handles_labels(), loc="upper center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 1 - (legend_of is not None) * 0.35 / figure.get_figheight()))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _memory(rows: dict[str, dict], path: Path) -> Path:
    figure, (axis,) = _figure(1, len(rows))
    kinds = ("parameters", "optimizer", "buckets")
    stacks = {kind: [row[kind] / MIB for row in rows.values()] for kind in kinds}
    rest = [(row["peak"] - sum(row[kind] for kind in kinds)) / MIB for row in rows.values()]
    _bars(axis, list(rows), {**stacks, "then: gradients, activations, gathered": rest})
    axis.set_xlabel("peak memory of a worker, MiB")
    return _save(figure, path, legend_of=axis)


def _traffic(rows: dict[str, dict], path: Path) -> Path:
    figure, (sent, collectives) = _figure(2, len(rows))
    _bars(sent, list(rows), {"": [row["bytes_sent"] / MIB for row in rows.values()]})
    _bars(collectives, list(rows), {"": [row["num_collectives"] for row in rows.values()]})
    sent.set_xlabel("sent by a worker in a step, MiB")
    collectives.set_xlabel("collectives of a worker in a step")
    return _save(figure, path)


def _step_time(times: dict[str, dict], path: Path) -> Path:
    names = list(next(iter(times.values())))
    figure, axes = _figure(len(times), len(names))
    labels = {part: _LABELS.get(part, part.removesuffix("_s")) for part in PARTS}
    for axis, (bandwidth, rows) in zip(axes, times.items(), strict=True):
        # Where next to nothing is exposed, noise may make it negative: no bar.
        stacks = {labels[part]: [max(0.0, 1e3 * rows[name][part]) for name in names] for part in PARTS}
        totals = [1e3 * rows[name]["step_s"] for name in names]
        _bars(axis, names, stacks, {labels[part]: color for part, color in _COLORS.items()}, totals)
        axis.set_title("no limit" if bandwidth == UNLIMITED else bandwidth)
        axis.set_xlabel("median step, ms")
    return _save(figure, path, legend_of=axes[0])


def _losses(found: dict, times: dict[str, dict], path: Path) -> Path:
    """Over steps, and over the time that they take on every network that was measured."""
    figure, axes = _figure(1 + len(times), 7)
    for name, curve in found["curves"].items():
        axes[0].plot(curve["step"], curve["evaluation"], label=name)
        for axis, rows in zip(axes[1:], times.values(), strict=True):
            axis.plot([step * rows[name]["step_s"] for step in curve["step"]], curve["evaluation"], label=name)
    axes[0].set_xlabel("steps")
    axes[0].set_ylabel("evaluation loss of the full model")
    for axis, bandwidth in zip(axes[1:], times, strict=True):
        axis.set_xlabel("seconds (steps x median step)" + ("" if bandwidth == UNLIMITED else f" at {bandwidth}"))
    return _save(figure, path, legend_of=axes[0])
