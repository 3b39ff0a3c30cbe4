"""Real worker processes for tests: a pool per world size that runs function after function.

Workers are forked from a server that has imported torch and transformers; a test costs only what it does. They talk over gloo, started from a
rendezvous file. A worker that raises sends its traceback; one that does not answer in time ends its pool.
"""

import multiprocessing
import os
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import wait

_POOLS: dict[int, "Pool"] = {}


def run_workers(function, *args, world_size: int = 4, timeout_s: float = 120) -> list:
    """Results of ``function(*args)`` from every worker, by rank. ``function`` must be importable."""
    pool = _POOLS.get(world_size)
    if pool is None:
        for other in list(_POOLS):  # two cores: one pool at a time
            _POOLS.pop(other).stop()
        pool = _POOLS[world_size] = Pool(world_size)
    try:
        return pool.run(function, args, timeout_s)
    except BaseException:
        _POOLS.pop(world_size).stop()
        raise


def stop_all() -> None:
    for world_size in list(_POOLS):
        _POOLS.pop(world_size).stop()


class Pool:
    def __init__(self, world_size: int):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["hf_sdp.hosts.trainer", "hf_sdp.pretrained", "transformers.models.llama.modeling_llama"]
        )
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, self.folder.name, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function, args, timeout_s: float) -> list:
        for pipe in self.pipes:
            pipe.send((function, args))
        results, failures = {}, []
        waiting = dict(zip(self.pipes, range(len(self.pipes)), strict=True))
        deadline = timeout_s + 60 * bool(not hasattr(self, "_warm"))
        self._warm = True
        while waiting:
            ready = wait(list(waiting), timeout=10 if failures else deadline)
            if not ready:
                break
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    ok, value = pipe.recv()
                except EOFError:
                    ok, value = False, "the process ended"
                results[rank] = value
                if not ok:
                    failures.append(f"--- rank {rank} ---\n{value}")
        if failures or waiting:
            late = f"\nno answer from ranks {sorted(waiting.values())}" if waiting else ""
            raise AssertionError("\n".join(failures) + late)
        return [results[rank] for rank in range(len(self.pipes))]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


def _serve(rank: int, world_size: int, folder: str, pipe) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",  # never used: the rendezvous is the file
        ACCELERATE_USE_CPU="true",
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
    )
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=100),
    )
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            _fresh()
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


def _fresh() -> None:
    """No state of a test before: Accelerate keeps singletons. (Process groups stay: torch caches meshes by value.)"""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    torch.manual_seed(0)
