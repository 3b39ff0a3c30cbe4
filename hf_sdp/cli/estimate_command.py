"""``hf-sdp estimate``."""

import dataclasses
import json
from collections.abc import Sequence

import click
from rich.console import Console
from rich.table import Table

from .. import make_plan
from ..estimate.allocations import WorkerMemory
from ..estimate.capacity import GIB
from ..estimate.side_by_side import Row, largest_coverage, other_rows, rows_of_phases, subnetworks
from ..estimate.time import StepTime, step_time
from ..model.phases import Planned
from ..planner import make_plans, num_subnetworks_of
from ..quantities import bytes_per_second, flops_per_second
from ..workload import Workload
from .adapters import lora_options, with_lora
from .models import load_meta_model, running
from .options import (
    PositiveNumber,
    Text,
    json_option,
    model_argument,
    pop_workload,
    sdp_config,
    sdp_options,
    workers_option,
    workload_options,
)

_KINDS = tuple(field.name for field in dataclasses.fields(WorkerMemory))


@click.command()
@model_argument
@workers_option
@sdp_options
@workload_options
@lora_options
@click.option("--gib", type=PositiveNumber(), help="Memory of a worker, GiB: what fits?")
@click.option(
    "--bandwidth",
    type=Text("bandwidth", bytes_per_second),
    help="Of a worker, to send and to receive: 10Gbit, 25GB/s.",
)
@click.option("--flops", type=Text("flop/s", flops_per_second), help="That the device reaches: 100TFLOPS, 100e12.")
@json_option
def estimate(
    model: str,
    workers: int,
    lora_r: int | None,
    lora_targets: str | None,
    gib: float | None,
    bandwidth: float | None,
    flops: float | None,
    as_json: bool,
    **options,
) -> None:
    """Memory, traffic and step time, beside DDP, ZeRO and FSDP2. Nothing is allocated.

    MODEL is a local folder or config.json, a name on the hub, or llama-134m, llama-500m, llama-1b, llama-7b. A step is
    one micro-batch and the optimizer. The step time is a model of two queues, not a measurement: --flops is what the
    device reaches on matrix products, a collective takes the bytes a worker sends divided by --bandwidth.
    """
    if (bandwidth is None) != (flops is None):
        raise click.UsageError("The step time needs both --bandwidth and --flops.")
    workload = pop_workload(options)
    config = sdp_config(workload=workload, **options)
    n = num_subnetworks_of(config, workers)
    full = with_lora(load_meta_model(model), lora_r, lora_targets)
    phases = make_plans(full, config, n)
    with running(model):
        rows = other_rows(full, workload, workers) + rows_of_phases(full, phases, workload, workers)
    times = {}
    if bandwidth is not None and flops is not None:
        times = {row.engine: _slowest(row, bandwidth, flops) for row in rows}
    coverages = None
    if gib is not None and n == workers and len(phases) == 1:
        phase = phases[0].phase
        coverages = largest_coverage(
            lambda coverage: make_plan(full, config.of_phase(dataclasses.replace(phase, coverage=coverage)), workers),
            full,
            phase.workload_of(workload),
            workers,
            int(gib * GIB),
        )
    learned = sum(p.numel() for p in full.parameters() if p.requires_grad)
    if as_json:
        report = _report(model, workers, workload, phases, learned, rows, gib, times, coverages)
        click.echo(json.dumps(report, indent=1))
        return
    console = Console(width=max(Console().width, 165))  # rows do not wrap: a terminal scrolls, a file does not care
    print_rows(console, model, workers, workload, phases, learned, rows, gib, coverages, times)


def print_rows(
    out: Console,
    model: str,
    workers: int,
    workload: Workload,
    phases: Sequence[Planned],
    learned: int,
    rows: list[Row],
    gib: float | None = None,
    coverages: dict[str, float | None] | None = None,
    times: dict[str, StepTime] | None = None,
) -> None:
    """The table of engines, and what it is of.

    Args:
        model: how it is called there. learned: how many of its parameters learn.
        gib, coverages, times: of the options ``--gib``, ``--bandwidth`` and ``--flops``.
    """
    numel = phases[0].plan.full_numel
    of_them = f", {learned / 1e6:,.1f} M of them learn" if learned < numel else ""
    out.print(_table(f"{model}: {numel / 1e6:,.0f} M parameters{of_them}", rows, gib, times or {}))
    _print_notes(out, workers, workload, phases, gib, coverages, times or {})


def _slowest(row: Row, bandwidth: float, flops: float) -> StepTime:
    """All workers wait for the slowest."""
    return max((step_time(step, bandwidth=bandwidth, flops=flops) for step in row.steps), key=lambda t: t.total)


def _table(title: str, rows: list[Row], gib: float | None, times: dict[str, StepTime]) -> Table:
    table = Table(title=title + ", GiB of the largest worker (smallest)")
    table.add_column("engine", no_wrap=True)
    columns = ["parameters", "gathered", "gradients", "optimizer", "activations", "peak"]
    columns += [f"fits {gib:g} GiB"] if gib is not None else []
    columns += ["sent", "step time", "exposed"] if times else ["sent"]
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        memory = row.largest.memory
        smallest = min(step.memory.peak for step in row.steps)
        peak = _gib(memory.peak)
        if _gib(smallest) != peak:
            peak += f" ({_gib(smallest)})"
        cells = [row.engine, *(_gib(getattr(memory, kind)) for kind in ("parameters", "gathered", "gradients"))]
        cells += [_gib(memory.optimizer), _gib(memory.activations), peak]
        if gib is not None:
            cells.append("fits" if memory.peak <= gib * GIB else "does not fit")
        cells.append(_gib(max(step.bytes_sent for step in row.steps)))
        if times:
            cells += [_seconds(times[row.engine].total), _seconds(times[row.engine].exposed)]
        table.add_row(*cells)
    return table


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}" if nbytes >= GIB / 10 or not nbytes else f"{nbytes / GIB:.4f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _print_notes(console, workers, workload, phases: Sequence[Planned], gib, coverages, times) -> None:
    checkpointing = ", activation checkpointing" if workload.gradient_checkpointing else ""
    stored = " and ".join(dict.fromkeys([workload.param_dtype, workload.dtype_of_frozen]))
    sdp = "; ".join(_said_of(planned, workload, len(phases) > 1) for planned in phases)
    console.print(
        f"{workers} workers, batch {workload.batch} x {workload.sequence} each, {workload.dtype} (stored "
        f"{stored}), {workload.optimizer}{checkpointing}. SDP: {sdp}.",
        highlight=False,
    )
    console.print(
        "Gathered and activations: the most of each over a step. The peak is not their sum: it also has gradients and "
        "buffers of collectives, and what of it all lives at one moment (--json: at_peak).",
        highlight=False,
    )
    console.print(
        "FSDP2 (ZeRO-3) reshards after forward where nothing is said, as Accelerate's default does; SDP does not.",
        highlight=False,
    )
    plan = phases[0].plan
    if len(subnetworks(plan)) < plan.num_subnetworks:
        console.print(
            f"SDP: {len(subnetworks(plan))} of {plan.num_subnetworks} subnetworks looked at.", highlight=False
        )
    if times:
        console.print(
            "Step time: a model of two queues (computation; collectives one after another), not a measurement.",
            highlight=False,
        )
    if gib is not None and coverages is None:
        where = "with one subnetwork per worker" if len(phases) == 1 else "without a schedule"
        console.print(f"The largest coverage that fits is looked for {where} only.")
    for name, coverage in (coverages or {}).items():
        found = "no coverage fits" if coverage is None else f"largest coverage that fits {coverage:g}"
        console.print(f"{name}: {found} {gib:g} GiB", highlight=False)


def _said_of(planned: Planned, workload: Workload, many: bool) -> str:
    plan, phase, pieces = planned.plan, planned.phase, planned.phase.pieces_of(workload)
    checkpointing = ", activation checkpointing" if phase.gradient_checkpointing else ""
    start = f"from {phase.start:g} of the training on: " if many else ""
    split = f", in {pieces} pieces" if pieces > 1 else ""
    return f"{start}{plan.level}, {plan.masking} masking, coverage {plan.coverage:.3g}{checkpointing}{split}"


def _report(
    model, workers, workload: Workload, phases: Sequence[Planned], learned: int, rows, gib, times, coverages
) -> dict:
    engines = []
    for row in rows:
        entry: dict = {"engine": row.engine}
        for kind in _KINDS:
            values = [getattr(step.memory, kind) for step in row.steps]
            entry[f"{kind}_bytes"] = {"min": min(values), "max": max(values)}
        sent = [step.bytes_sent for step in row.steps]
        entry["bytes_sent_per_step"] = {"min": min(sent), "max": max(sent)}
        flops = [step.flops for step in row.steps]
        entry["flops_per_step"] = {"min": min(flops), "max": max(flops)}
        if gib is not None:
            entry["fits"] = row.largest.memory.peak <= gib * GIB
        if times:
            time = times[row.engine]
            entry["step_time_s"] = {
                "total": time.total,
                "compute": time.compute,
                "communication": time.communication,
                "exposed": time.exposed,
            }
        engines.append(entry)
    plans = [
        {
            **({"start": planned.phase.start} if len(phases) > 1 else {}),
            "level": planned.plan.level,
            "masking": planned.plan.masking,
            "coverage": planned.plan.coverage,
            "hash": planned.plan.hash,
        }
        for planned in phases
    ]
    return {
        "model": model,
        "parameters": phases[0].plan.full_numel,
        "learned_parameters": learned,
        "workers": workers,
        "workload": dataclasses.asdict(workload),
        **({"plan": plans[0]} if len(phases) == 1 else {"phases": plans}),
        "gib": gib,
        "engines": engines,
        "largest_coverage_that_fits": coverages,
    }
