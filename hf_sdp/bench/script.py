"""What a script costs with DDP, FSDP2 and SDP: 20 optimizer steps of each, one engine after the other.

Every worker runs the script once for each engine, in a process of its own that ends after those steps. What is measured
is measured at the script's optimizer: nothing needs to be known of its loop.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..config import SDPConfig
from ..engine.metrics import STATE_KINDS, StepMeter
from ..engine.sharded import find_sharded
from ..estimate.names import DDP, FSDP2, SDP
from ..world.ring import BOTH_WAYS, sent_in_ring

STEPS = 20
ENGINES = {"ddp": DDP, "fsdp2": FSDP2, "sdp": SDP}
_MIB = 2**20
_ROWS = {
    **{f"state_bytes_{kind}_max": (f"{kind}, MiB", _MIB, "{:.1f}") for kind in STATE_KINDS},
    "peak_bytes": ("peak memory of a step, MiB", _MIB, "{:.1f}"),
    "bytes_sent_per_step": ("sent per step, MiB", _MIB, "{:.1f}"),
    "step_time_s": ("median step, s", 1, "{:.3f}"),
    "loss": ("training loss, mean of the last 5 steps", 1, "{:.3f}"),
}


def config_of(engine: str, config: SDPConfig) -> SDPConfig:
    """FSDP2 is SDP with everything held, and reshards. Under DDP the model is not patched: none has an effect."""
    if engine != "fsdp2":
        return config
    everything: dict[str, Any] = dict(coverage=1.0, depth_profile="uniform", always_held=(), memory_gib=None)
    as_fsdp2: dict[str, Any] = dict(sharding="full", reshard_after_forward=True)
    return dataclasses.replace(config, **everything, **as_fsdp2, workload=None, masking="forward")


class _Gradients:
    """What DDP sends: an all-reduce of the gradients."""

    def __init__(self, model: nn.Module):
        self.bytes_sent = 0
        gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        self.of_a_step = int(sent_in_ring(gradients, dist.get_world_size(), BOTH_WAYS))


class Measured:
    """Counts the optimizer's steps from the second one on, and ends the process after :data:`STEPS`.

    Args:
        file: JSON of what was measured; rank 0 writes it.
    """

    def __init__(self, model: nn.Module, file: Path):
        self.model, self.file = model, file
        self.steps = 0
        self.meter: StepMeter | None = None
        self.losses: list[float] = []
        model.register_forward_hook(self._saw)
        register_optimizer_step_pre_hook(self._before)
        register_optimizer_step_post_hook(self._after)

    def _saw(self, module: nn.Module, args: tuple, output: Any) -> None:
        loss = getattr(output, "loss", None)
        if module.training and loss is not None:
            self.losses.append(loss.item())

    def _before(self, optimizer, args, kwargs) -> None:
        if self.meter is not None:
            self.meter.gradients_ready()

    def _after(self, optimizer, args, kwargs) -> None:
        self.steps += 1
        if self.meter is None:
            sharded = find_sharded(self.model)
            traffic = _Gradients(self.model) if sharded is None else sharded.traffic
            device = next(self.model.parameters()).device
            self.meter = StepMeter(self.model, device, traffic, profiles_memory=True)
        else:
            if isinstance(self.meter.traffic, _Gradients):
                self.meter.traffic.bytes_sent += self.meter.traffic.of_a_step
            self.meter.step_end(optimizer)
        if self.steps == STEPS:
            self._end()
        self.meter.step_begin()

    def _end(self) -> None:
        assert self.meter is not None
        found = {name.removeprefix("sdp/"): value for name, value in self.meter.report(world=True).items()}
        of_a_step = max(1, len(self.losses) // STEPS)
        if self.losses:
            found["loss"] = statistics.mean(self.losses[-5 * of_a_step :])
        if dist.get_rank() == 0:
            self.file.write_text(json.dumps(found))
        dist.barrier()
        sys.exit(0)


def compare(command: list[str]) -> None:
    """Run the script with each engine, on all workers, and print a table on rank 0.

    ``command``: of :mod:`hf_sdp.run`, to which ``--measure ENGINE:FILE`` is added. Exits with a worker's code, if one
    fails.
    """
    rank = int(os.environ.get("RANK", "0"))
    results: dict[str, dict] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, engine in enumerate(ENGINES):
            file = Path(folder) / f"{engine}.json"
            # In torchrun's store they would find the addresses of the workers of the engine before.
            port = str(int(os.environ.get("MASTER_PORT", "29500")) + 1 + number)
            environment = os.environ | {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
            done = subprocess.run(
                [sys.executable, "-m", "hf_sdp.run", "--measure", f"{engine}:{file}", *command], env=environment
            )
            if done.returncode:
                sys.exit(done.returncode)
            if rank == 0:
                if not file.exists():
                    sys.exit(f"hf_sdp.run: the script ended before {STEPS} optimizer steps with {ENGINES[engine]}.")
                results[engine] = json.loads(file.read_text())
    if rank == 0:
        Console().print(table(results))


def table(results: dict[str, dict]) -> Table:
    """One column for each engine; of the workers the one that stores or sends most."""
    grid = Table(
        title=f"{os.environ.get('WORLD_SIZE', '1')} workers, {STEPS} optimizer steps",
        caption="FSDP2: SDP with coverage 1, resharded after forward. With forward masking SDP's training loss is "
        "of the subnetworks. So few steps compare costs, not quality.",
    )
    grid.add_column("per worker")
    for engine in results:
        grid.add_column(ENGINES[engine], justify="right")
    for name, (label, divisor, form) in _ROWS.items():
        cells = (form.format(result[name] / divisor) if name in result else "" for result in results.values())
        grid.add_row(label, *cells)
    return grid
