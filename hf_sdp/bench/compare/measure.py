"""What is measured, from within the workers: memory and traffic of one engine, step times of all in turn, losses.

Step times. All engines exist at once and are stepped in turn, one step of each a round, starting with another one every
round, so that a busy machine slows all of them alike. Beside every step there is one of the same engine *without
communication* (:meth:`Contender.without_communication`): no collective is called and no worker waits for another, while
everything else is done as ever. Its parts are the forward, backward and optimizer that are reported, and what the real
step takes longer is the *exposed communication*: what sending, receiving and reducing cost the step after all overlap,
the processor time that they take from computation (gloo runs on the cores that compute), and waiting for workers that
have not come as far. The difference is the same measurement for every engine and backend, needs no hook inside of
them, and the four parts add up to the step.
"""

import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from ...config import SDPConfig
from ...engine.metrics import PeakMemory, state_bytes
from ..network import bytes_on_the_wire
from ..workers import progress
from .contenders import Contender, DDPTraffic, Workplace


def memory_and_traffic(name: str, sdp: SDPConfig | None, workplace: Workplace) -> dict[str, int]:
    """Of this worker, for one engine in a process of its own: bytes of ``parameters``, ``gradients``, ``optimizer`` and
    ``buckets`` (DDP's), the ``peak`` of all that is allocated during a step, ``bytes_sent`` and ``num_collectives`` of
    a step, ``flops`` of its forward and backward.

    Two steps come before: moments exist then, and DDP has cut its buckets anew. On CPU the peak is what is stored plus
    the allocator's events of the step; on GPU it is ``torch.cuda.max_memory_allocated``. Collective.
    """
    engine = Contender(name, sdp, workplace)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(2):
        engine.step(workplace.random_ids(generator))
    bytes_before, collectives_before = engine.traffic.bytes_sent, engine.traffic.num_collectives
    with FlopCounterMode(display=False) as flops:
        engine.forward(workplace.random_ids(generator)).backward()
    sent, collectives = engine.traffic.bytes_sent - bytes_before, engine.traffic.num_collectives - collectives_before
    stored = state_bytes(engine.model, engine.optimizer)
    engine.update()
    stored["buckets"] = engine.traffic.buffer_bytes if isinstance(engine.traffic, DDPTraffic) else 0
    ids, memory = workplace.random_ids(generator), PeakMemory(engine.device)
    if engine.device.type == "cuda":
        before = torch.cuda.memory_allocated(engine.device)
    else:
        before = stored["parameters"] + stored["optimizer"] + stored["buckets"]
    memory.start()
    engine.step(ids)
    stored["peak"] = before + memory.stop()
    return {**stored, "bytes_sent": sent, "num_collectives": collectives, "flops": flops.get_total_flops()}


class Sample(NamedTuple):
    """One step of one worker: seconds, seconds of processor time, and bytes sent on a limited network (else None)."""

    forward_s: float
    backward_s: float
    optimizer_s: float
    cpu_s: float
    wire_bytes: int | None

    @property
    def step_s(self) -> float:
        return self.forward_s + self.backward_s + self.optimizer_s


class Samples(NamedTuple):
    """Of one worker and engine, one each a round."""

    steps: list[Sample]
    silent: list[Sample]


def step_times(
    engines: dict[str, SDPConfig | None], workplace: Workplace, rounds: int, warmup: int
) -> dict[str, Samples]:
    """Samples of this worker for every engine (see above). Collective."""
    made = [Contender(name, sdp, workplace) for name, sdp in engines.items()]
    return timed_rounds(made, workplace, rounds, warmup)


def timed_rounds(
    engines: list[Contender], workplace: Workplace, rounds: int, warmup: int, silent: bool = True
) -> dict[str, Samples]:
    """``silent``: also time the steps without communication. Collective."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    samples = {engine.name: Samples([], []) for engine in engines}
    for k in range(-warmup, rounds):
        start = k % len(engines)
        for engine in engines[start:] + engines[:start]:
            ids = workplace.random_ids(generator)
            step = _timed(engine, ids)
            if silent:
                with engine.without_communication():
                    without = _timed(engine, ids)
            if k >= 0:
                samples[engine.name].steps.append(step)
                if silent:
                    samples[engine.name].silent.append(without)
            progress()
    return samples


def _timed(engine: Contender, ids: torch.Tensor) -> Sample:
    dist.barrier()
    sent_before, cpu_began = bytes_on_the_wire(), time.process_time()
    parts = engine.step(ids)
    cpu_s = time.process_time() - cpu_began
    if sent_before is None:
        return Sample(*parts, cpu_s, None)
    dist.barrier()  # what others wait for is sent
    sent_after = bytes_on_the_wire()
    assert sent_after is not None  # the network stays limited
    return Sample(*parts, cpu_s, sent_after - sent_before)
