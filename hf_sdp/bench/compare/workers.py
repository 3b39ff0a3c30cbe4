"""Worker processes on this machine: forked from a server that has imported everything, one function each.

A worker that fails ends all of them at once, with its traceback here; one that says nothing for too long likewise.
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
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

from .network import INTERFACE, enter

_to_parent = None  # in a worker: the pipe to who has launched it


class WorkerError(RuntimeError):
    """A worker failed. ``reason``: one line; the text of the error is the worker's whole traceback."""

    def __init__(self, rank: int, text: str):
        super().__init__(f"rank {rank}:\n{text}")
        self.reason = f"rank {rank}: {text.strip().splitlines()[-1]}"


def context():
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(
        ["hf_sdp.hosts.trainer", "hf_sdp.pretrained", "transformers.models.llama.modeling_llama"]
    )
    return forkserver


def join_world(rank: int, world_size: int, rendezvous: str, *, device: str = "cpu", timeout_s: float = 120) -> None:
    """Make this process worker ``rank``: over gloo with one thread, or ("cuda") over NCCL with GPU ``rank``.

    ``timeout_s``: of a collective.
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", HF_HUB_OFFLINE="1",
        KINETO_LOG_LEVEL="9",  # the profiler tells of every start
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    options: dict[str, Any] = dict(
        init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s)
    )
    if device == "cuda":
        torch.cuda.set_device(rank)
        dist.init_process_group("nccl", device_id=torch.device("cuda", rank), **options)
    else:
        os.environ["ACCELERATE_USE_CPU"] = "true"
        dist.init_process_group("gloo", **options)


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
                ours, theirs = context().Pipe()
                joining = (rank, world_size, f"{folder}/rendezvous", device, timeout_s)
                namespace = namespaces[rank] if namespaces else None
                arguments = (function, args, joining, namespace, theirs)
                processes.append(context().Process(target=_answer, args=arguments, daemon=True))
                processes[-1].start()
                theirs.close()
                pipes.append(ours)
            results = _collect(pipes, processes, timeout_s, on_progress)
            for process in processes:
                process.join(10)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that workers are ended and what was made is removed.

    Signals can be set in the main thread only: in another one nothing changes.
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


def _collect(pipes: list, processes: list, timeout_s: float, on_progress: Callable) -> list:
    waiting: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    results: dict[int, object] = {}
    failures: list[tuple[bool, int, str]] = []
    while waiting:
        ready: list[Any] = wait(list(waiting), timeout=1 if failures else timeout_s)
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
                results[rank] = value
            else:
                failures.append((kind != "ended", rank, value))
    if failures:  # a process that is gone is the cause, what the others then say of their connections is not
        _, rank, text = min(failures, key=lambda failure: failure[0])
        raise WorkerError(rank, text)
    if waiting:
        raise WorkerError(min(waiting.values()), f"no word from ranks {sorted(waiting.values())} for {timeout_s:g} s")
    return [results[rank] for rank in range(len(pipes))]


def _answer(function: Callable, args: tuple, joining: tuple, namespace: str | None, pipe) -> None:
    global _to_parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes: the parent ends this one
    _to_parent = pipe
    rank, world_size, rendezvous, device, timeout_s = joining
    try:
        if namespace is not None:
            enter(namespace)
            os.environ["GLOO_SOCKET_IFNAME"] = INTERFACE
        join_world(rank, world_size, rendezvous, device=device, timeout_s=timeout_s)
        pipe.send(("done", function(*args)))
    except BaseException:
        pipe.send(("failed", traceback.format_exc()))
        time.sleep(2)  # so that this is heard before the others see their connections closed
