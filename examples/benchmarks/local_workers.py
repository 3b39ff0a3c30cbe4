"""Worker processes on this machine for the benchmarks: forked from a server that has imported everything."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta


def context():
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["hf_sdp", "transformers.trainer", "transformers.models.llama.modeling_llama"])
    return forkserver


def join_world(rank: int, world_size: int, rendezvous: str) -> None:
    """Make this process worker ``rank``, over gloo, with one thread."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true", HF_HUB_OFFLINE="1",
    )  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size, timeout=timedelta(seconds=120)
    )


def launch(function: Callable, world_size: int, *args, timeout_s: float = 600) -> list:
    """Results of ``function(*args)`` on every one of ``world_size`` new workers, by rank.

    Raises: RuntimeError with the traceback of a worker that failed, or that ended or took too long without an answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank in range(world_size):
            ours, theirs = context().Pipe()
            arguments = (function, args, rank, world_size, f"{folder}/rendezvous", theirs)
            processes.append(context().Process(target=_answer, args=arguments, daemon=True))
            processes[-1].start()
            theirs.close()
            pipes.append(ours)
        try:
            results = []
            for rank, pipe in enumerate(pipes):
                if not pipe.poll(timeout_s):
                    raise RuntimeError(f"rank {rank} gave no answer within {timeout_s} s")
                ok, result = pipe.recv()
                if not ok:
                    raise RuntimeError(f"rank {rank}:\n{result}")
                results.append(result)
            for process in processes:
                process.join(10)
            return results
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answer(function: Callable, args: tuple, rank: int, world_size: int, rendezvous: str, pipe) -> None:
    try:
        join_world(rank, world_size, rendezvous)
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
