"""Worker processes on this machine: forked from a server that has imported everything, one function each.

A worker that fails ends all of them at once, with its traceback here; one that says nothing for too long likewise.
The pieces (``context``, ``join_world``, ``answer``, ``collect``) also make workers that live for several functions, as
those of the tests.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .network import INTERFACE, enter

if TYPE_CHECKING:
    from torch.distributed import Store

_PRELOADED = ["hf_sdp.hosts.trainer", "hf_sdp.pretrained", "transformers.models.llama.modeling_llama"]

_to_parent = None  # in a worker: the pipe to who has launched it


class WorkerError(RuntimeError):
    """A worker failed. ``reason``: one line; the text of the error is the worker's whole traceback."""

    def __init__(self, rank: int, text: str):
        super().__init__(f"rank {rank}:\n{text}")
        self.reason = f"rank {rank}: {text.strip().splitlines()[-1]}"


@dataclass(frozen=True)
class Failure:
    """A worker that raised (``text``: its traceback), or that ended without an answer."""

    rank: int
    text: str
    ended: bool


@dataclass
class Answers:
    """What workers have said: results by rank, failures in the order in which they came, ranks that said nothing."""

    results: dict[int, object] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)


def context(device: str = "cpu"):
    """Processes and pipes come from here: a server that has imported what takes long, and forks workers.

    Those on "cuda" are started anew: what they import may ask for a GPU, and in a fork of a process that has asked
    there is none.
    """
    if device == "cuda":
        return multiprocessing.get_context("spawn")
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(_PRELOADED)
    return forkserver


def join_world(
    rank: int,
    world_size: int,
    rendezvous: str,
    *,
    device: str = "cpu",
    timeout_s: float = 120,
    store_in_file: bool = False,
) -> None:
    """Make this process worker ``rank``: over gloo with one thread, or ("cuda") over NCCL with GPU ``rank``.

    With fewer GPUs than workers these share them (:func:`_share_gpus`): for proofs, not for speed.

    Args:
        rendezvous: a file that is not there yet, in which rank 0 tells the others its port.
        timeout_s: of a collective.
        store_in_file: ``rendezvous`` itself is the store: for workers that do not share a network, or may be killed.
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", HF_HUB_OFFLINE="1",
        KINETO_LOG_LEVEL="9",  # the profiler tells of every start
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    timeout = timedelta(seconds=timeout_s)
    meet = _meet_in_file if store_in_file else _meet
    store = meet(rank, world_size, Path(rendezvous), timeout)
    options: dict[str, Any] = dict(store=store, rank=rank, world_size=world_size, timeout=timeout)
    if device == "cuda":
        num_gpus = torch.cuda.device_count()
        if 0 < num_gpus < world_size:
            _share_gpus(rank, num_gpus)
        gpu = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(gpu)
        dist.init_process_group("nccl", device_id=torch.device("cuda", gpu), **options)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        dist.init_process_group("gloo", **options)


def _share_gpus(rank: int, num_gpus: int) -> None:
    """Let every ``num_gpus`` workers be a host of their own: NCCL refuses two workers on one GPU of one host.

    Hosts talk over sockets, here of this machine alone, and workers on one GPU wait for their turns on it. So this is
    for proofs: no time that is measured here says anything.
    """
    os.environ.update(LOCAL_RANK=str(rank % num_gpus), LOCAL_WORLD_SIZE=str(num_gpus))
    of_its_own = dict(NCCL_HOSTID=str(rank // num_gpus), NCCL_NET="Socket", NCCL_SOCKET_IFNAME="lo")
    for name, value in of_its_own.items():
        os.environ.setdefault(name, value)


def _meet_in_file(rank: int, world_size: int, rendezvous: Path, timeout: timedelta) -> "Store":
    from torch.distributed import FileStore

    store = FileStore(str(rendezvous), world_size)
    store.set_timeout(timeout)
    return store


def _meet(rank: int, world_size: int, rendezvous: Path, timeout: timedelta) -> "Store":
    """A store of the kind that launchers make. Rank 0 serves it."""
    from torch.distributed import TCPStore

    if rank == 0:
        store = TCPStore("127.0.0.1", 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        unfinished = rendezvous.with_suffix(".unfinished")
        unfinished.write_text(str(store.port))
        unfinished.rename(rendezvous)
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while not rendezvous.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank 0 has not told its port within {timeout.total_seconds():g} s")
        time.sleep(0.01)
    return TCPStore("127.0.0.1", int(rendezvous.read_text()), world_size, is_master=False, timeout=timeout)


def launch(
    function: Callable,
    world_size: int,
    *args,
    timeout_s: float = 600,
    device: str = "cpu",
    namespaces: Sequence[str] | None = None,
    on_progress: Callable[[], None] = lambda: None,
) -> list:
    """Results of ``function(*args)`` on every one of ``world_size`` new workers, by rank.

    Args:
        timeout_s: longest time without a word from any worker, and of a collective.
        namespaces: network namespace of each worker (see ``network.py``).
        on_progress: called here whenever rank 0 calls :func:`progress`.
    Raises: WorkerError when a worker fails, ends, or says nothing for ``timeout_s``. No worker is left then.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        try:
            for rank in range(world_size):
                ours, theirs = context(device).Pipe()
                joining = (rank, world_size, f"{folder}/rendezvous", device, timeout_s)
                namespace = namespaces[rank] if namespaces else None
                arguments = (function, args, joining, namespace, theirs)
                processes.append(context(device).Process(target=_work, args=arguments, daemon=True))
                processes[-1].start()
                theirs.close()
                pipes.append(ours)
            answers = collect(pipes, processes, timeout_s, on_progress=on_progress)
            _raise_failure(answers, timeout_s)
            for process in processes:
                process.join(10)
            return [answers.results[rank] for rank in range(world_size)]
        finally:
            for process in processes:
                process.kill()
                process.join()


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that workers are ended and what was made is removed.

    Without effect in other threads than the main one: signals can be set there only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def progress() -> None:
    """Tell who has launched this worker that it is going on. Only rank 0 is heard."""
    if _to_parent is not None and os.environ["RANK"] == "0":
        _to_parent.send(("progress", None))


def collect(
    pipes: Sequence[Connection],
    processes: Sequence,
    timeout_s: float,
    *,
    patience_s: float = 1,
    on_progress: Callable[[], None] = lambda: None,
) -> Answers:
    """One answer from every worker, by rank; what :func:`answer` sends on the other side of the pipes.

    Args:
        timeout_s: longest time without a word from any worker.
        patience_s: the same from the first failure on. The others then often wait for the one that failed.
    """
    waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    answers = Answers()
    while waiting:
        ready: list[Any] = wait(list(waiting), timeout=patience_s if answers.failures else timeout_s)
        if not ready:
            break
        for pipe in ready:
            rank = waiting[pipe]
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError):
                processes[rank].join(5)
                kind, value = "ended", f"ended without an answer (exit code {processes[rank].exitcode})"
            if kind == "progress":
                on_progress()
                continue
            del waiting[pipe]
            if kind == "done":
                answers.results[rank] = value
            else:
                answers.failures.append(Failure(rank, value, ended=kind == "ended"))
    answers.silent = sorted(waiting.values())
    return answers


def answer(pipe: Connection, function: Callable, args: tuple) -> bool:
    """In a worker: send the result of ``function(*args)``, or the traceback. Returns: whether there is a result."""
    try:
        pipe.send(("done", function(*args)))
        return True
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
        return False


def _raise_failure(answers: Answers, timeout_s: float) -> None:
    if answers.failures:  # a process that is gone is the cause, what the others then say of their connections is not
        first = min(answers.failures, key=lambda failure: not failure.ended)
        raise WorkerError(first.rank, first.text)
    if answers.silent:
        raise WorkerError(answers.silent[0], f"no word from ranks {answers.silent} for {timeout_s:g} s")


def _work(function: Callable, args: tuple, joining: tuple, namespace: str | None, pipe: Connection) -> None:
    """A worker's life."""
    global _to_parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes: the parent ends this one
    _to_parent = pipe
    if not answer(pipe, _join_and_call, (function, args, joining, namespace)):
        time.sleep(2)  # so that this is heard before the others see their connections closed


def _join_and_call(function: Callable, args: tuple, joining: tuple, namespace: str | None):
    rank, world_size, rendezvous, device, timeout_s = joining
    if namespace is not None:
        enter(namespace)
        os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
    join_world(rank, world_size, rendezvous, device=device, timeout_s=timeout_s, store_in_file=namespace is not None)
    return function(*args)
