"""What a worker stores, allocates, sends and waits for, measured while it trains."""

import contextlib
import statistics
import time
from collections.abc import Iterator

import torch
from torch import nn

from ..model.state import local_tensor
from ..world.agreement import of_everyone
from .sharded import find_sharded
from .traffic import BytesSent

STATE_KINDS = ("parameters", "gradients", "optimizer")


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, int]:
    """Bytes this worker stores now, by kind: its shards of parameters and gradients, and all tensors of the
    optimizer's state that have the shape of a shard (step counters are left out). Works for any model."""
    sharded = find_sharded(model)
    parameters = list(model.parameters() if sharded is None else sharded.parameters.values())
    states = [] if optimizer is None else list(optimizer.state.values())
    return {
        "parameters": sum(local_tensor(p.detach()).nbytes for p in parameters),
        "gradients": sum(local_tensor(p.grad).nbytes for p in parameters if p.grad is not None),
        "optimizer": sum(
            local_tensor(t).nbytes for s in states for t in s.values() if isinstance(t, torch.Tensor) and t.dim() > 0
        ),
    }


class PeakMemory:
    """Peak of allocated bytes between :meth:`start` and :meth:`stop`, above what was allocated at the start.

    On CUDA the caching allocator's own statistics. On CPU the allocator has none, so its events are taken from the
    profiler, which slows that step down: measure one.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._profile: torch.autograd.profiler.profile | None = None

    def start(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            # That of torch.profiler makes a Python object of each event when it ends: half of a short training's time.
            self._profile = torch.autograd.profiler.profile(profile_memory=True)
            self._profile.__enter__()

    def stop(self) -> int:
        """Peak bytes above the start."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._before
        assert self._profile is not None  # start() has made it
        self._profile.__exit__(None, None, None)
        allocated = peak = 0
        for event in sorted(memory_events(self._profile), key=lambda e: e.start_ns()):
            allocated += event.nbytes()
            peak = max(peak, allocated)
        self._profile = None
        return peak


def memory_events(profile) -> list:
    """Of the CPU's allocator."""
    return [e for e in profile.kineto_results.events() if e.name() == "[memory]"]


class StepMeter:
    """Measures optimizer steps from their first micro-batch to the end of ``optimizer.step``.

    The second step is measured for memory, and not for time. Between steps nothing is counted, so evaluation, logging
    and saving are left out.

    Args:
        traffic: counts bytes in ``bytes_sent``.
        profiles_memory: on the CPU, whether the second step is profiled: a second or two, and lines in the log.
    """

    def __init__(self, model: nn.Module, device: torch.device, traffic: BytesSent, *, profiles_memory: bool):
        self.model, self.device, self.traffic = model, device, traffic
        self._measures_peak = profiles_memory or device.type == "cuda"
        self._reported_state = False
        self.num_steps = 0
        self.step_times_s: list[float] = []
        self.bytes_sent: list[int] = []
        self.state: dict[str, int] = dict.fromkeys(STATE_KINDS, 0)
        self.peak_bytes = 0
        self._memory: PeakMemory | None = None

    def step_begin(self) -> None:
        if self.num_steps == 1 and self._measures_peak:
            self._resident = sum(self.state.values()) - self.state["gradients"]
            self._memory = PeakMemory(self.device)
            self._memory.start()
        self._traffic_before = self.traffic.bytes_sent
        self._synchronize()
        self._began = time.perf_counter()

    def gradients_ready(self) -> None:
        """Just before ``optimizer.step``: gradients exist."""
        if self.num_steps == 0:
            self.state["gradients"] = state_bytes(self.model, None)["gradients"]

    def step_end(self, optimizer: torch.optim.Optimizer) -> None:
        self._synchronize()
        elapsed = time.perf_counter() - self._began
        if self._memory is not None:
            self.peak_bytes = self._resident + self._memory.stop()
            self._memory = None
        elif self.num_steps > 0:
            self.step_times_s.append(elapsed)
        if self.num_steps == 0:
            measured = state_bytes(self.model, optimizer)
            self.state.update(parameters=measured["parameters"], optimizer=measured["optimizer"])
        self.bytes_sent.append(self.traffic.bytes_sent - self._traffic_before)
        self.num_steps += 1

    def report(self, *, world: bool) -> dict[str, float]:
        """What was measured since the last report, under the names the Trainer logs. Collective if ``world``:
        state is the minimum and maximum over workers and comes once, all else is the maximum."""
        values = {
            "bytes_sent_per_step": statistics.median(self.bytes_sent) if self.bytes_sent else 0,
            "peak_bytes": self.peak_bytes,
            "step_time_s": statistics.median(self.step_times_s) if self.step_times_s else 0.0,
        }
        if not self._reported_state and self.num_steps:
            values["state_bytes"] = sum(self.state.values())
            values.update({f"state_bytes_{kind}": self.state[kind] for kind in STATE_KINDS})
            self._reported_state = True
        self.bytes_sent, self.step_times_s = [], []
        everyone = of_everyone(values) if world else [values]
        report = {}
        for name in values:
            if name.startswith("state_bytes"):
                report[f"sdp/{name}_min"] = min(v[name] for v in everyone)
                report[f"sdp/{name}_max"] = max(v[name] for v in everyone)
            else:
                report[f"sdp/{name}"] = max(v[name] for v in everyone)
        # Not measured yet (the first steps warm up): leave it out rather than report a zero.
        return {name: v for name, v in report.items() if v or "bytes_sent" in name}

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextlib.contextmanager
def measured_peak(device: torch.device) -> Iterator[list[int]]:
    """``with measured_peak(device) as peak: ...`` puts the peak bytes above the start into ``peak[0]``."""
    memory, result = PeakMemory(device), [0]
    memory.start()
    try:
        yield result
    finally:
        result[0] = memory.stop()
