"""The results file: runs that are done are kept, and are not repeated."""

import json
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

import torch

from ...errors import SDPConfigError
from .methods import Method
from .setting import Setting

Job = tuple[Method, int]
"""A method and a seed."""


class Results:
    """``results.json`` of a folder: the setting, and the runs by method and seed.

    Raises: SDPConfigError when the file is there and cannot be read.
    """

    def __init__(self, folder: str | Path):
        self.path = Path(folder) / "results.json"
        self.setting: dict | None = None
        self.runs: dict[str, dict[str, dict]] = {}
        if self.path.exists():
            try:
                stored = json.loads(self.path.read_text(encoding="utf-8"))
                self.setting, self.runs = stored["setting"], stored["runs"]
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise SDPConfigError(f"{self.path} is no results file: {error!r}. Use another folder.") from error

    def expect(self, setting: Setting) -> None:
        """Raises SDPConfigError when the file holds runs of another setting: they could not be compared."""
        wanted = json.loads(json.dumps(asdict(setting)))  # a tuple comes back as a list
        if self.setting is None:
            self.setting = wanted
        differ = [
            f"{name}={self.setting.get(name)!r} there, {value!r} asked"
            for name, value in wanted.items()
            if self.setting.get(name) != value
        ]
        if differ:
            raise SDPConfigError(f"{self.path} has runs of another setting ({'; '.join(differ)}). Use another folder.")

    def has(self, method: Method, seed: int) -> bool:
        return str(seed) in self.runs.get(method.name, {})

    def add(self, method: Method, seed: int, run: dict) -> None:
        """Also writes the file, whole or not at all."""
        self.runs.setdefault(method.name, {})[str(seed)] = run
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(
            json.dumps({"setting": self.setting, "runs": self.runs}, indent=1) + "\n", encoding="utf-8"
        )
        os.replace(unfinished, self.path)


def flops_after(run: dict, steps: int) -> float:
    """Training FLOPs of the first ``steps`` steps of a run."""
    phases = run.get("phases", [[0, run["step_flops"]]])
    ends = [*(first for first, _ in phases[1:]), steps]
    return sum(max(0, min(steps, end) - first) * flops for (first, flops), end in zip(phases, ends, strict=True))


def jobs_in_order(methods: list[Method], seeds: list[int]) -> list[Job]:
    """The first seed of every method, then method by method: what is there first is a comparison already."""
    return [(method, seeds[0]) for method in methods] + [(method, seed) for method in methods for seed in seeds[1:]]


def train_missing(
    results: Results,
    jobs: list[Job],
    train: Callable[[Method, int], dict],
    *,
    processes: int = 1,
    note: str = "",
    on_done: Callable[[Job, dict], None] = lambda job, run: None,
) -> None:
    """Train what ``results`` does not have, ``processes`` runs at a time, and add each run as soon as it is done.

    Args:
        train: makes a run; other processes get it by pickle.
        note: kept with every run (a commit, a machine).
    """
    missing = [job for job in jobs if not results.has(*job)]

    def keep(job: Job, run: dict) -> None:
        results.add(*job, {**run, "note": note})
        on_done(job, run)

    if processes == 1:
        for job in missing:
            keep(job, train(*job))
        return
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, (os.cpu_count() or 1) // processes))
    with ProcessPoolExecutor(processes, get_context("spawn"), torch.set_num_threads, (threads,)) as pool:
        futures = {pool.submit(train, *job): job for job in missing}
        try:
            for future in as_completed(futures):
                keep(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
