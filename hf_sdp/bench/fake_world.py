"""One worker of a world in one process, without the others: what it allocates in a step, and computes on a GPU.

Collectives run on torch's fake process group: buffers are allocated as ever, no data moves, values are garbage.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..compat import fake_store
from ..config import SDPConfig
from ..engine.fsdp import fully_shard_plainly, mixed_precision_policy
from ..engine.metrics import measured_peak, state_bytes
from ..engine.optimizer import repoint
from ..engine.shard import shard
from ..engine.sharded import find_sharded
from ..estimate.names import DDP, FSDP2
from ..patch import patch_model

_WARM_UP, _TIMED = 3, 10  # steps


@contextlib.contextmanager
def fake_world(world_size: int, rank: int = 0) -> Iterator[None]:
    """This process is one worker of a world whose others do not exist."""
    gc.collect()  # nothing of an earlier world may be freed while this one is measured
    torch.cuda.empty_cache()  # nor be in pieces where this one needs memory as a whole; without effect on a CPU
    dist.init_process_group("fake", store=fake_store(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def parallelize(
    model: nn.Module, engine: SDPConfig | str, device: torch.device, param_dtype: str | None = None
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The model as this worker has it, and its AdamW. To be called within a world.

    Args:
        engine: an SDPConfig; or DDP, FSDP2 or FSDP2_NO_RESHARD of ``estimate.names``.
        param_dtype: FSDP2's mixed precision, for plain FSDP2; an SDPConfig has its own.
    """
    if isinstance(engine, SDPConfig):
        shard(patch_model(model, engine), device)
    elif engine == DDP:
        model = DistributedDataParallel(model.to(device))
        model.register_comm_hook(None, _finished)  # the reducer cannot wait for fake collectives
    else:
        policy = mixed_precision_policy(param_dtype)
        reshards = engine == FSDP2
        fully_shard_plainly(model.to(device), device.type, reshard_after_forward=reshards, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if isinstance(engine, SDPConfig):
        repoint(optimizer, model)
    return model, optimizer


def _finished(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    buffer = bucket.buffer()
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else [])
    future.set_result(buffer)
    return future


def measure_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[int, int]],
    device: torch.device,
    *,
    autocast: bool = False,
    batch_of: Callable[[int, int], dict[str, torch.Tensor]] | None = None,
) -> list[dict[str, float]]:
    """Bytes for each batch (sequences, tokens of each), and on CUDA the time of a step of the last one.

    Two small steps come first: moments exist then, and DDP has rebuilt its buckets.
    Args:
        batch_of: (sequences, tokens of each) -> arguments of the model; default: tokens and their labels.
    Returns: for each batch the state by kind (of ``metrics.state_bytes``); ``buckets``: DDP's, which are not measured
        but are as large as the gradients; ``step``: the peak of a step above what was allocated before it;
        ``bytes_sent`` (SDP). ``step_s``: seconds, the median of ten steps; of computation alone, since the fake process
        group sends nothing (it copies within this GPU what an all-gather puts together).
    """
    sharded = find_sharded(model)
    stored: dict[str, int] = {}

    def tokens(num_sequences: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.zeros(num_sequences, length, dtype=torch.long, device=device)
        return {"input_ids": ids, "labels": ids}

    def step(num_sequences: int, length: int) -> None:
        inputs = (batch_of or tokens)(num_sequences, length)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = model(**inputs).loss
        loss.backward()
        stored["gradients"] = state_bytes(model, None)["gradients"]
        optimizer.step()
        optimizer.zero_grad()

    step(1, 16)
    step(1, 16)
    stored |= {k: v for k, v in state_bytes(model, optimizer).items() if k != "gradients"}
    stored["buckets"] = stored["gradients"] if isinstance(model, DistributedDataParallel) else 0
    results: list[dict[str, float]] = []
    for num_sequences, length in batches:
        sent = 0 if sharded is None else sharded.traffic.bytes_sent
        with measured_peak(device) as peak:
            step(num_sequences, length)
        sent = 0 if sharded is None else sharded.traffic.bytes_sent - sent
        results.append({**stored, "step": peak[0], "bytes_sent": sent})
    if device.type == "cuda":
        results[-1]["step_s"] = _median_s(lambda: step(*batches[-1]), device)
    return results


def _median_s(step: Callable[[], None], device: torch.device) -> float:
    times = []
    for _ in range(_WARM_UP + _TIMED):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        step()
        torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times[_WARM_UP:])
