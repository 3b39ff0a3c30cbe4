"""A picture of a plan: units by layer from top to bottom, subnetworks across, attention and MLP side by side."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ..families.kinds import KINDS
from ..plan.holders import Holders
from ..plan.holdings import Holdings
from ..plan.plan import Plan
from ..plan.units import MaskableModule

FORMATS = (".png", ".svg")
MAX_COLUMNS = 64
"""With more subnetworks, a column is several of them and a row a whole module, shaded by the share they hold."""
DPI = 120
_COLORS = matplotlib.colormaps["tab20"](range(20))
_NOT_HELD = "0.93"


def draw_plan(plan: Plan, path: Path) -> None:
    """Write the picture as PNG or SVG, by the name's ending. Raises: OSError when it cannot be written."""
    stacks: dict[str, list[MaskableModule]] = {}
    for module in plan.modules:
        stacks.setdefault(module.kind, []).append(module)
    depth = max(len(stack) for stack in stacks.values())
    width = 2 + len(stacks) * np.clip(0.3 * plan.num_subnetworks, 2.5, 6)
    figure = Figure(figsize=(width, np.clip(0.22 * depth, 3, 24)), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(stacks), squeeze=False)[0]
    draw = _draw_units if plan.num_subnetworks <= MAX_COLUMNS else _draw_shares
    draw(plan, dict(zip(panels, stacks.values(), strict=True)), figure)
    for panel, (kind, stack) in zip(panels, stacks.items(), strict=True):
        step = -(-len(stack) // 32)
        panel.set_yticks(np.arange(0, len(stack), step) + 0.5, [module.layer for module in stack[::step]], fontsize=7)
        panel.set_ylim(len(stack), 0)
        panel.set_xlim(0, plan.num_subnetworks)
        columns = np.arange(0, plan.num_subnetworks, -(-plan.num_subnetworks // 16))
        panel.set_xticks(columns + 0.5, columns, fontsize=7)
        panel.tick_params(length=0)
        panel.set_title(KINDS[kind].title, fontsize=9)
        panel.set_xlabel("subnetwork", fontsize=8)
    panels[0].set_ylabel("layer", fontsize=8)
    figure.suptitle(
        f"{plan.level} level, {plan.num_subnetworks} subnetworks, "
        f"coverage {plan.coverage:.3g} (without shared parameters)",
        fontsize=8,
    )
    figure.savefig(path, format=path.suffix[1:].lower())


def _draw_units(plan: Plan, stacks: dict, figure: Figure) -> None:
    """Neighbouring units with the same holders are one cell. Coloured by holder set, or by the number of holders where
    units have different numbers or there are more sets than colours."""
    sets = Holdings.of(plan).sets
    numbers = sorted({len(holders) for holders in sets})
    by_number = len(numbers) > 1 or len(sets) > len(_COLORS)
    groups: Sequence[int | Holders] = numbers if by_number else sets
    color_of = {group: index for index, group in enumerate(groups)}
    continuous = len(groups) > len(_COLORS)
    scale = matplotlib.colormaps["viridis"].resampled(len(groups))
    rgba = scale(range(len(groups))) if continuous or by_number else _COLORS[: len(groups)]
    colors = matplotlib.colors.ListedColormap(rgba, "holders")
    for panel, stack in stacks.items():
        edges, rows = [0.0], []
        for index, module in enumerate(stack):
            runs = [(h, len(list(run))) for h, run in itertools.groupby(plan.unit_holders[module.name])]
            for holders, length in runs:
                row = np.full(plan.num_subnetworks, np.nan)
                row[list(holders)] = color_of[len(holders) if by_number else holders]
                rows.append(row)
                edges.append(edges[-1] + length / module.num_units)
            edges[-1] = index + 1.0
        panel.set_facecolor(_NOT_HELD)
        panel.pcolormesh(
            np.arange(plan.num_subnetworks + 1), edges, np.stack(rows), cmap=colors, vmin=-0.5, vmax=len(groups) - 0.5,
            rasterized=len(rows) * plan.num_subnetworks > 20_000,
        )  # fmt: skip
        panel.hlines(np.arange(1, len(stack)), 0, plan.num_subnetworks, color="0.5", linewidth=0.4)
        panel.vlines(np.arange(1, plan.num_subnetworks), 0, len(stack), color="white", linewidth=0.6)
    shown = list(range(len(groups)))[:: -(-len(groups) // 20)]
    patches = [Patch(color=colors(i), label=_label(groups[i])) for i in shown]
    figure.legend(handles=patches, loc="outside right center", fontsize=7, frameon=False)


def _draw_shares(plan: Plan, stacks: dict, figure: Figure) -> None:
    holdings = Holdings.of(plan)
    num_units = np.array([module.num_units for module in plan.modules])
    shares = (holdings.units / num_units[:, None]) @ holdings.members.T.astype(float)
    edges = np.linspace(0, plan.num_subnetworks, MAX_COLUMNS + 1).round().astype(int)
    shares = np.add.reduceat(shares, edges[:-1], axis=1) / np.diff(edges)
    row_of = {module.name: index for index, module in enumerate(plan.modules)}
    for panel, stack in stacks.items():
        values = shares[[row_of[module.name] for module in stack]]
        mesh = panel.pcolormesh(edges, np.arange(len(stack) + 1), values, cmap="Blues", vmin=0, vmax=1, rasterized=True)
    bar = figure.colorbar(mesh, ax=list(stacks), shrink=0.6)
    bar.set_label("share held (mean of the column's subnetworks)", fontsize=7)
    bar.ax.tick_params(labelsize=7)


def _label(group: int | Holders) -> str:
    """Of a number of holders, or of a holder set."""
    if isinstance(group, int):
        return f"{group} holder{'s' * (group > 1)}"
    return f"held by {_short(group)}"


def _short(holders: Holders) -> str:
    """``0-3, 8`` for ``(0, 1, 2, 3, 8)``, cut short where it is long."""
    runs: list[list[int]] = []
    for subnetwork in holders:
        if runs and runs[-1][-1] + 1 == subnetwork:
            runs[-1][1:] = [subnetwork]
        else:
            runs.append([subnetwork])
    texts = ["-".join(map(str, run)) for run in runs]
    return ", ".join(texts if len(texts) <= 8 else [*texts[:7], "..."])
