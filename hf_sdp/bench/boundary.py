"""A boundary of a coverage schedule, measured: what it sends, and what is allocated while it lasts."""

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.profiler import profile, record_function
from transformers import LlamaForCausalLM, set_seed

from ..config import SDPConfig
from ..engine.handover import Handover
from ..engine.metrics import memory_events
from ..engine.sharded import get_sharded
from ..hosts.accelerator import SDPAccelerator
from ..patch import patch_model
from .small_llama import small_llama

_BOUNDARY = "hf_sdp boundary"


@dataclass
class Crossing:
    """Of one worker.

    Attributes:
        sent: bytes, to others.
        before, peak, after: bytes that torch has allocated. Before and after it a worker has parameters and optimizer
            state alone; gradients are gone.
    """

    sent: int
    before: int
    peak: int
    after: int


class Training:
    """A Llama of ``sizes`` and AdamW on random tokens, under a schedule of two phases. Collective, as all it does."""

    def __init__(self, sdp: dict, sizes: dict):
        set_seed(0)
        self.accelerator = SDPAccelerator(cpu=True)
        config = small_llama(**sizes)
        model = patch_model(LlamaForCausalLM(config), SDPConfig(**sdp))
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
        self.accelerator.follow_schedule(0, 2)
        self.vocab_size, self.random = config.vocab_size, torch.Generator().manual_seed(dist.get_rank())

    def step(self, batch: int, length: int) -> tuple[float, int]:
        """Seconds, and bytes that this worker has sent."""
        traffic = get_sharded(self.model, "Measuring").traffic
        before, began = traffic.bytes_sent, time.perf_counter()
        ids = torch.randint(0, self.vocab_size, (batch, length), generator=self.random)
        self.accelerator.backward(self.model(input_ids=ids, labels=ids).loss)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - began, traffic.bytes_sent - before

    def go_to(self, phase: int) -> float:
        """Seconds."""
        dist.barrier()
        began = time.perf_counter()
        assert self.accelerator.follow_schedule(phase, 2)
        return time.perf_counter() - began


def cross(sdp: dict, sizes: dict) -> Crossing:
    """From the first phase to the second one, after a step."""
    sent, give = [], Handover.give

    def watched(self, *args, **kwargs):
        give(self, *args, **kwargs)
        sent.append(self.bytes_sent)

    Handover.give = watched  # type: ignore[method-assign]
    try:
        # From the start: of what it has not seen allocated it does not see that it is freed.
        with profile(profile_memory=True) as of_all:
            training = Training(sdp, sizes)
            training.step(1, 16)
            with record_function(_BOUNDARY):
                training.go_to(1)
    finally:
        Handover.give = give  # type: ignore[method-assign]
    return Crossing(sent[0], *_levels(of_all))


def _levels(of_all: profile) -> tuple[int, int, int]:
    assert of_all.kineto_results is not None  # it has ended
    (boundary,) = [event for event in of_all.kineto_results.events() if event.name() == _BOUNDARY]
    begin, end = boundary.start_ns(), boundary.start_ns() + boundary.duration_ns()
    before = after = peak = 0
    for event in sorted(memory_events(of_all), key=lambda e: e.start_ns()):
        if event.start_ns() > end:
            break
        after += event.nbytes()
        if event.start_ns() < begin:
            before = peak = after
        peak = max(peak, after)
    return before, peak, after
