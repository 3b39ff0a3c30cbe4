"""Real worker processes for tests: a pool per world size and device that runs function after function.

Workers are launched as those of the benchmarks (hf_sdp/bench/workers.py), and live on: a test costs only what it does.
A worker that raises sends its traceback; one that does not answer in time ends its pool.
"""

import gc
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from hf_sdp.bench.workers import Answers, answer, collect, context, join_world

COLLECTIVE_TIMEOUT_S = 100
START_S = {"cpu": 60, "cuda": 120}  # what the first function of a pool may take longer
END_S = 60  # for a worker's own end
_POOLS: dict[tuple[int, str], "Pool"] = {}


def run_workers(function: Callable, *args, world_size: int = 4, timeout_s: float = 120, device: str = "cpu") -> list:
    """Results of ``function(*args)`` from every worker, by rank. ``function`` must be importable.

    ``device``: "cpu" (over gloo), or "cuda" (over NCCL; workers share GPUs where there are fewer of them).
    """
    pool = _POOLS.get((world_size, device))
    if pool is None:
        stop_all()  # two cores: one pool at a time
        pool = _POOLS[world_size, device] = Pool(world_size, device)
    try:
        return pool.run(function, args, timeout_s)
    except BaseException:
        _POOLS.pop((world_size, device)).kill()
        raise


def stop_all() -> None:
    """Workers that have done all that was asked for leave their process groups and end by themselves, without fault.

    Their processes end as those of multiprocessing do, without the interpreter's finalization. Processes that finalize
    are those of world/test_roll_call.py.
    """
    for world_size, device in list(_POOLS):
        exit_codes = _POOLS.pop((world_size, device)).stop()
        assert exit_codes == [0] * world_size, f"exit codes of {world_size} workers at their end: {exit_codes}"


def compute_exactly() -> None:
    """On a GPU as on the CPU: no TF32, and none of cuDNN's convolutions, which are other ones for other widths."""
    import torch

    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.enabled = False


class Pool:
    def __init__(self, world_size: int, device: str):
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        self.start_s = START_S[device]
        for rank in range(world_size):
            ours, theirs = context(device).Pipe()
            arguments = (rank, world_size, f"{self.folder.name}/rendezvous", device, theirs)
            process = context(device).Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable, args: tuple, timeout_s: float) -> list:
        for pipe in self.pipes:
            pipe.send((function, args))
        # Ten seconds after a failure the others have failed as well: what they say often tells more.
        answers = collect(self.pipes, self.processes, timeout_s + self.start_s, patience_s=10)
        self.start_s = 0
        _raise_failures(answers)
        return [answers.results[rank] for rank in range(len(self.pipes))]

    def stop(self) -> list[int | None]:
        """Let the workers end. Returns: their exit codes, None for those that have not ended in time."""
        for pipe in self.pipes:
            pipe.close()
        deadline = time.monotonic() + END_S
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        exit_codes = [process.exitcode for process in self.processes]
        self.kill()
        return exit_codes

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


def _raise_failures(answers: Answers) -> None:
    said = [f"--- rank {failure.rank} ---\n{failure.text}" for failure in answers.failures]
    if answers.silent:
        said.append(f"no answer from ranks {answers.silent}")
    if said:
        raise AssertionError("\n".join(said))


def _serve(rank: int, world_size: int, rendezvous: str, device: str, pipe: Connection) -> None:
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    import torch.distributed as dist

    compute_exactly()
    join_world(rank, world_size, rendezvous, device=device, timeout_s=COLLECTIVE_TIMEOUT_S)
    _leave_out_of_collections()
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:  # the pool has closed the pipe
            break
        answer(pipe, _call_afresh, (function, args))
    dist.destroy_process_group()


def _leave_out_of_collections() -> None:
    """All that exists: a Trainer collects garbage, and would look through all modules of the hosts, half a second."""
    gc.freeze()


def _call_afresh(function: Callable, args: tuple):
    _fresh()
    return function(*args)


def _fresh() -> None:
    """No state of a test before: Accelerate keeps singletons. (Process groups stay: torch caches meshes by value.)"""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0)
