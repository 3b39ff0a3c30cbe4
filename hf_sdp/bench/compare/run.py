"""``compare``: all passes of a comparison, each in worker processes of its own, and what they found."""

import contextlib
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...config import SDPConfig
from ...errors import SDPConfigError
from ...families import structure_of
from ...families.meta_model import meta_model
from ...planner import make_plan, num_subnetworks_of
from ...quantities import bits_per_second
from ..network import limited_network
from ..workers import ended_by_sigterm, launch
from .contenders import Workplace
from .losses import curves, losses, write_tokens
from .measure import Samples, memory_and_traffic, step_times

UNLIMITED = "none"
"""Instead of a bandwidth: the workers talk over the machine's loopback device, or as NCCL does."""


def check(engines: dict[str, SDPConfig | None], workplace: Workplace, bandwidths: list[str]) -> None:
    """Everything that can be refused before a process is started. Raises: SDPConfigError."""
    structure_of(meta_model(workplace.model))
    for sdp in engines.values():
        if sdp is None:
            continue
        if workplace.workers == 1:
            raise SDPConfigError("SDP needs at least 2 workers, got 1.")
        make_plan(workplace.model, sdp, num_subnetworks_of(sdp, workplace.workers))
    if workplace.device == "cuda":
        if torch.cuda.device_count() < workplace.workers:
            raise SDPConfigError(
                f"{workplace.workers} workers need a GPU each, this machine has {torch.cuda.device_count()}. "
                "Use --device cpu or fewer workers."
            )
        if bandwidths != [UNLIMITED]:
            raise SDPConfigError(
                "GPUs of one machine do not talk over its network: a bandwidth limit needs the device cpu."
            )
    for bandwidth in bandwidths:
        with _network(workplace.workers, bandwidth):  # whether this machine allows it
            pass


@ended_by_sigterm()
def compare(
    engines: dict[str, SDPConfig | None],
    workplace: Workplace,
    *,
    bandwidths: list[str],
    rounds: int,
    warmup: int,
    loss_steps: int = 0,
    learning_rate: float = 1e-3,
    timeout_s: float = 600,
    on_stage: Callable[[str, int], Callable[[], None]] = lambda name, total: lambda: None,
    on_result: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Measure all engines, after :func:`check`.

    Args:
        engines: name -> config, None for one of ``contenders.BASELINES``' values.
        bandwidths: of the networks on which steps are timed: ``"1Gbit"`` etc., or ``UNLIMITED``.
        rounds, warmup: steps of every engine and bandwidth that are timed, and that are not.
        loss_steps: of the loss curves; 0: none.
        timeout_s: longest time without a word from the workers.
        on_stage: called with the name and the length of every pass; returns what is called at each of its steps.
        on_result: called with all results so far after every pass.
    Returns: ``{"memory": {name: figures}, "times": {bandwidth: {name: figures}}, "losses": {...}}``, see
        :func:`largest`, :func:`summary` and :func:`~hf_sdp.bench.compare.losses.losses`. Figures are those of the
        worker with the largest.
    Raises: WorkerError.
    """
    started: dict[str, Any] = dict(timeout_s=timeout_s, device=workplace.device)
    result: dict = {"memory": {}, "times": {}, "losses": {}}
    step = on_stage("memory and traffic", len(engines))
    for name, sdp in engines.items():
        workers = launch(memory_and_traffic, workplace.workers, name, sdp, workplace, **started)
        result["memory"][name] = largest(workers)
        step()
    on_result(result)
    for bandwidth in bandwidths:
        step = on_stage(
            "step times" + (f", {bandwidth}" if bandwidth != UNLIMITED else ""), (rounds + warmup) * len(engines)
        )
        with _network(workplace.workers, bandwidth) as namespaces:
            workers = launch(
                step_times, workplace.workers, engines, workplace, rounds, warmup,
                namespaces=namespaces, on_progress=step, **started,
            )  # fmt: skip
        result["times"][bandwidth] = {name: summary([worker[name] for worker in workers]) for name in engines}
        on_result(result)
    if loss_steps:
        _add_losses(result["losses"], engines, workplace, loss_steps, learning_rate, on_stage, started)
        on_result(result)
    return result


@contextlib.contextmanager
def _network(num_workers: int, bandwidth: str):
    if bandwidth == UNLIMITED:
        yield None
        return
    with limited_network(num_workers, bits_per_second(bandwidth)) as namespaces:
        yield namespaces


def _add_losses(
    found: dict, engines, workplace: Workplace, steps: int, learning_rate: float, on_stage, started
) -> None:
    trained = curves(engines)
    step = on_stage("losses", steps * len(trained))
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder, "tokens.pt")
        found["corpus"] = write_tokens(tokens, workplace, steps)
        found["curves"] = {}
        for name, same in trained.items():
            arguments = (name, engines[name], workplace, str(tokens), steps, learning_rate)
            workers = launch(losses, workplace.workers, *arguments, on_progress=step, **started)
            found["curves"][name] = {"engines": same, **workers[0]}


def largest(workers: list[dict[str, int]]) -> dict[str, int]:
    """Each figure of the worker that has most of it."""
    return {kind: max(worker[kind] for worker in workers) for kind in workers[0]}


def summary(workers: list[Samples]) -> dict:
    """Step times of one engine from the samples of all workers.

    ``step_s``: median over rounds of the slowest worker's step; ``range_s``: smallest and largest round; ``forward_s``,
    ``backward_s``, ``optimizer_s``: medians of the worker that is slowest without communication; ``exposed_s``: the
    rest of the step (a little below zero where there is nothing but noise); ``cpu_s``: median of all workers' processor
    time together; ``wire_bytes``: median of the worker that sends most; ``steps_s``, ``silent_steps_s``: every round.
    """
    rounds = list(zip(*(worker.steps for worker in workers), strict=True))
    steps_s = [max(sample.step_s for sample in samples) for samples in rounds]
    found = {
        "step_s": statistics.median(steps_s),
        "range_s": [min(steps_s), max(steps_s)],
        "cpu_s": statistics.median(sum(sample.cpu_s for sample in samples) for samples in rounds),
        "steps_s": steps_s,
    }
    if rounds[0][0].wire_bytes is not None:
        found["wire_bytes"] = statistics.median(max(sample.wire_bytes for sample in samples) for samples in rounds)
    silent = [
        max(samples, key=lambda sample: sample.step_s)
        for samples in zip(*(worker.silent for worker in workers), strict=True)
    ]
    if silent:
        for part in ("forward_s", "backward_s", "optimizer_s"):
            found[part] = statistics.median(getattr(sample, part) for sample in silent)
        found["exposed_s"] = found["step_s"] - sum(found[f"{p}_s"] for p in ("forward", "backward", "optimizer"))
        found["silent_steps_s"] = [sample.step_s for sample in silent]
    return found
