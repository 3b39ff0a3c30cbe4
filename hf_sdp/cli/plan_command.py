"""``hf-sdp plan``."""

import dataclasses
import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from ..config import SDPConfig
from ..estimate.figures import SHARED, PlanFigures, plan_figures, spread
from ..model.phases import Planned
from ..plan.plan import Plan
from ..plan.worker_graph import MAX_EXACT
from ..planner import make_plans, num_subnetworks_of
from ..workload import DTYPES
from .errors import CommandError
from .extras import require_bench
from .models import load_meta_model
from .options import (
    json_option,
    model_argument,
    pop_workload,
    refuse_without_memory,
    sdp_config,
    sdp_options,
    sharding_options,
    workers_option,
    workload_options,
)
from .tables import console, short, short_bytes

MAX_ROWS = 16
"""Of the table of subnetworks; then the least, the mean and the most follow."""


@click.command()
@model_argument
@workers_option
@sdp_options
@sharding_options
@workload_options
@click.option("--picture", type=click.Path(path_type=Path), help="PNG or SVG file: units by layer, who holds what.")
@json_option
@click.pass_context
def plan(context: click.Context, model: str, workers: int, picture: Path | None, as_json: bool, **options) -> None:
    """Who holds what, how evenly, and what crosses the wire.

    MODEL is a local folder or config.json, a name on the hub, or llama-134m, llama-500m, llama-1b, llama-7b. FLOPs are
    for sequences of --seq tokens, bytes for elements of --dtype; the other options of the batch matter with
    --memory-gib only.
    """
    refuse_without_memory(context, ("batch", "param_dtype", "frozen_dtype", "optimizer", "gradient_checkpointing"))
    if picture is not None:
        _check_picture(picture)
    workload = pop_workload(options)
    config = sdp_config(workload=workload, **options)
    subnetworks = num_subnetworks_of(config, workers)
    full = load_meta_model(model)
    phases = make_plans(full, config, subnetworks)
    if picture is not None and len(phases) > 1:
        raise CommandError("--picture draws one plan. Leave out --coverage-schedule, and draw its phases one by one.")
    of_phases = [
        plan_figures(
            planned.plan,
            full,
            planned.config,
            num_workers=workers,
            sequence=workload.sequence,
            element_bytes=DTYPES[workload.dtype],
        )  # fmt: skip
        for planned in phases
    ]
    if picture is not None:
        _draw(phases[0].plan, picture)
    if as_json:
        reports = [_as_json(model, p, figures) for p, figures in zip(phases, of_phases, strict=True)]
        starts = [{"start": planned.phase.start} for planned in phases]
        of_all = {"phases": [start | report for start, report in zip(starts, reports, strict=True)]}
        print(json.dumps(reports[0] if len(phases) == 1 else of_all, indent=1))
    else:
        for planned, figures in zip(phases, of_phases, strict=True):
            name = model if len(phases) == 1 else f"{model}, from {planned.phase.start:g} of the training on"
            print_figures(console(), name, planned.config, figures)
        if picture is not None:
            print(f"Picture: {picture}")


def _check_picture(path: Path) -> None:
    """Before any work."""
    require_bench("plan --picture", "matplotlib")
    from ..bench.picture import FORMATS  # only here: without a picture nobody needs matplotlib

    if path.suffix.lower() not in FORMATS:
        raise CommandError(f"--picture {path} must end in one of {', '.join(FORMATS)}.")
    if not path.parent.is_dir():
        raise CommandError(f"--picture {path} cannot be written: there is no folder {path.parent}.")


def _draw(plan: Plan, path: Path) -> None:
    from ..bench.picture import draw_plan

    try:
        draw_plan(plan, path)
    except OSError as error:
        raise CommandError(f"--picture {path} cannot be written: {error.strerror or error}.") from error


def _as_json(model: str, planned: Planned, figures: PlanFigures) -> dict:
    return {
        "model": model,
        "sdp_config": dataclasses.asdict(planned.config),
        "plan_hash": planned.plan.hash,
        "num_workers": figures.num_workers,
        "num_subnetworks": figures.num_subnetworks,
        "sequence": figures.sequence,
        "element_bytes": figures.element_bytes,
        "full": {"parameters": figures.full_parameters, "flops_per_token": figures.full_flops},
        "summary": figures.summary(),
        "subnetworks": [figures.subnetwork(index) for index in range(figures.num_subnetworks)],
    }


def print_figures(out: Console, model: str, config: SDPConfig, figures: PlanFigures) -> None:
    """Tables of the subnetworks, and of the whole. ``model``: how it is called there."""
    out.print(_subnetworks(model, config, figures))
    out.print(_summary(config, figures))


def _subnetworks(model: str, config: SDPConfig, figures: PlanFigures) -> Table:
    n = figures.num_subnetworks
    each = "" if figures.num_workers == n else f", each held by {figures.num_workers // n} workers"
    table = Table(title=f"{model}\n{n} subnetworks{each}, {config.level} level, {config.masking} masking")
    kinds = [kind for kind in figures.parameters if kind != SHARED]
    columns = ["subnetwork", "parameters", "of full", *kinds, SHARED, "FLOPs/token", "of full", "sent per step"]
    for column in columns:
        table.add_column(column, justify="right")
    parameters, flops = sum(figures.parameters.values()), sum(figures.flops.values())
    full_parameters, full_flops = sum(figures.full_parameters.values()), sum(figures.full_flops.values())

    def add(name: str, of) -> None:
        """``of``: an array of all subnetworks -> the number to show."""
        table.add_row(
            name,
            short(of(parameters)),
            f"{of(parameters) / full_parameters:.1%}",
            *(f"{of(figures.parameters[kind]) / figures.full_parameters[kind]:.1%}" for kind in kinds),
            short(of(figures.parameters[SHARED])),
            short(of(flops)),
            f"{of(flops) / full_flops:.1%}",
            short_bytes(of(figures.bytes_sent)),
        )

    for index in range(n if n <= MAX_ROWS else MAX_ROWS // 2):
        add(str(index), lambda values, index=index: values[index].item())
    if n > MAX_ROWS:
        table.add_row("...")
    table.add_section()
    for which in ("min", "mean", "max") if n > MAX_ROWS else ():
        add(which, lambda values, which=which: spread(values)[which])
    table.add_section()
    table.add_row("full model", short(full_parameters), *[""] * (2 + len(kinds)), short(full_flops))
    return table


def _summary(config: SDPConfig, figures: PlanFigures) -> Table:
    summary = figures.summary()
    asked = config.coverage if config.memory_gib is None else f"what fits {list(config.memory_gib)} GiB"
    asked = ", ".join(f"{share:g}" for share in asked) if isinstance(asked, tuple) else asked

    def of(name: str, show=lambda value: f"{value:.4g}") -> str:
        low, mean, high = (show(summary[name][which]) for which in ("min", "mean", "max"))
        return mean if low == high else f"{low} to {high}, mean {mean}"

    gap = summary["spectral_gap"]
    components = summary["num_components"]
    names = {2: "bf16 or fp16", 4: "fp32"}
    communicators = (
        "one communicator each" if config.masking == "forward" else "one communicator: all is sharded over all"
    )
    rows = {
        "coverage asked": str(asked),
        "coverage reached": of("coverage"),
        "replication (holders of a unit)": f"{of('replication')}; {summary['num_units']} units",
        "distinct holder sets": f"{summary['num_holder_sets']} ({communicators})",
        "straggler ratio (max / mean)": f"parameters {summary['parameters_straggler_ratio']:.3f}, "
        f"FLOPs {summary['flops_straggler_ratio']:.3f}, bytes sent {summary['bytes_sent_straggler_ratio']:.3f}",
        "bytes sent per worker and step": f"{of('bytes_sent_per_step', short_bytes)} ({names[figures.element_bytes]}, "
        f"sharding {config.sharding}{', reshard after forward' if config.reshard_after_forward else ''})",
        "FLOPs per token": f"{of('flops_per_token', short)} (sequences of {figures.sequence})",
        "worker graph": "connected" if components == 1 else f"NOT connected: {components} groups share no unit",
        "spectral gap": f"{gap:.4f}" if gap is not None else f"not computed above {MAX_EXACT} distinct holder sets",
    }
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table
