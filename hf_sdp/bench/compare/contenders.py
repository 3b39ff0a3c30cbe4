"""The engines that are compared: DDP, DDP with activation checkpointing, FSDP2 and SDP, with one face.

Every engine trains the same model from the same weights with what a training loop does per batch: forward, backward,
clipping, and the fused AdamW of the Trainer's default.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForCausalLM, PretrainedConfig

from ...compat import checkpoint_activations, fsdp_groups, functional_collectives
from ...config import SDPConfig
from ...engine.fsdp import fsdp_modules, fully_shard_plainly
from ...engine.sharded import get_sharded
from ...engine.traffic import Traffic
from ...estimate.figures import plan_figures
from ...estimate.names import DDP, DDP_CHECKPOINTING, FSDP2, FSDP2_NO_RESHARD, RESHARD, SDP, SHARDING_NONE
from ...families.meta_model import meta_model
from ...hosts.accelerator import SDPAccelerator
from ...hosts.optimizer import VotingOptimizer
from ...patch import patch_model
from ...planner import make_plan
from ...world.ring import BOTH_WAYS, sent_in_ring

BASELINES = {
    "ddp": DDP,
    "ddp-checkpointing": DDP_CHECKPOINTING,
    "fsdp2": FSDP2,
    "fsdp2-no-reshard": FSDP2_NO_RESHARD,
}
"""Name on the command line -> name in tables."""
MAX_NORM = 1.0


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """What all engines of a comparison have in common.

    Attributes:
        model: transformers config of the model (``use_cache`` False).
        batch, sequence: sequences of a worker's batch and tokens of each.
        device: "cpu" (gloo, one thread a worker) or "cuda" (NCCL, one GPU a worker).
        dtype: "fp32", or "bf16": autocast. Parameters and optimizer state are stored in fp32.
    """

    model: PretrainedConfig
    workers: int
    batch: int
    sequence: int
    device: str = "cpu"
    dtype: str = "fp32"

    def this_device(self) -> torch.device:
        """The device of the worker that asks."""
        return torch.device("cuda", torch.cuda.current_device()) if self.device == "cuda" else torch.device("cpu")

    def random_ids(self, generator: torch.Generator) -> torch.Tensor:
        """Token ids (batch, sequence) on this worker's device; ``generator`` is on the CPU."""
        shape = (self.batch, self.sequence)
        return torch.randint(0, self.model.vocab_size, shape, generator=generator).to(self.this_device())


def sdp_name(config: SDPConfig) -> str:
    """``"SDP neuron C=0.5, sharding none"``: level, coverage, and every other option that is not its default."""
    shares = config.coverage if isinstance(config.coverage, tuple) else (config.coverage,)
    asked = "" if config.memory_gib else f" C={','.join(f'{c:g}' for c in shares)}"
    words = [f"{SDP} {config.level}{asked}"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in ("level", "coverage", "workload") or value == field.default:
            continue
        words.append(_WORDS.get((field.name, value)) or f"{field.name}={value}".replace("(", "[").replace(")", "]"))
    return ", ".join(words)


_WORDS = {
    ("masking", "backward"): "backward",
    ("sharding", "none"): SHARDING_NONE,
    ("reshard_after_forward", True): RESHARD,
}


class Parts(NamedTuple):
    """Seconds of one step."""

    forward_s: float
    backward_s: float
    optimizer_s: float


class Contender:
    """A model with its optimizer, however it is parallelized. Making one is collective, and so is a step.

    Args:
        name: of ``BASELINES``' values, or any when there is a ``sdp`` config.
    Attributes:
        traffic: counts ``bytes_sent`` and ``num_collectives`` for parameters and gradients. See
            ``hf_sdp/engine/traffic.py``.
    """

    def __init__(self, name: str, sdp: SDPConfig | None, workplace: Workplace, learning_rate: float = 1e-4):
        self.name, self.dtype, self.device = name, workplace.dtype, workplace.this_device()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(workplace.model, dtype=torch.float32).to(self.device)
        model.train()
        self.clip: Callable = clip_grad_norm_
        self.traffic: Traffic | DDPTraffic
        if sdp is not None:
            accelerator = SDPAccelerator()
            patch_model(model, sdp)
            optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)
            self.model, self.optimizer = accelerator.prepare(model, optimizer)
            self.clip, self.traffic = accelerator.clip_grad_norm_, get_sharded(model, "A comparison").traffic
            return
        if name in (FSDP2, FSDP2_NO_RESHARD):
            fully_shard_plainly(model, self.device.type, reshard_after_forward=name == FSDP2)
            self.traffic = Traffic(model)
        else:
            if name == DDP_CHECKPOINTING:
                checkpoint_activations(model)
            model = DistributedDataParallel(model)
            self.traffic = DDPTraffic(model)
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The loss of this worker's batch."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == "bf16"):
            return self.model(input_ids=ids, labels=ids).loss

    def update(self) -> None:
        """Clipping and the optimizer's step."""
        self.clip(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def step(self, ids: torch.Tensor) -> Parts:
        began = self._now()
        loss = self.forward(ids)
        forward = self._now()
        loss.backward()
        backward = self._now()
        self.update()
        return Parts(forward - began, backward - forward, self._now() - backward)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def without_communication(self) -> Iterator[None]:
        """Steps within send nothing and wait for nobody: every collective for parameters, gradients and their norm is
        a local copy of what would have been received, or nothing. All other work of the engine is done (buckets and
        buffers are filled and emptied). The values computed are garbage of the usual size."""
        with contextlib.ExitStack() as stack:
            replace = lambda *args, **kwargs: stack.enter_context(mock.patch.object(*args, **kwargs))  # noqa: E731
            if isinstance(self.model, DistributedDataParallel):
                replace(self.traffic, "silent", True)
                replace(self.model, "will_sync_module_buffers", lambda: False)
            for module in fsdp_modules(self.model):
                for group in fsdp_groups(module):
                    replace(group, "_all_gather_comm", _LocalGather(group._all_gather_comm))
                    replace(group, "_reduce_scatter_comm", _LocalScatter(group._reduce_scatter_comm))
                    replace(group, "_all_reduce_hook", None)  # counts
            if isinstance(self.optimizer, VotingOptimizer):  # workers vote on the number of their step
                replace(self.optimizer, "num_steps", self.optimizer.num_steps)
            replace(dist, "all_reduce", lambda tensor, *args, **kwargs: None)
            # The norm of FSDP2's gradients, a DTensor, goes this way.
            replace(functional_collectives, "all_reduce", lambda tensor, *args, **kwargs: tensor)
            yield


class DDPTraffic:
    """Counts the bytes a worker sends for gradients: each bucket is all-reduced. ``buffer_bytes``: what the buckets
    occupy, for as long as the model lives. While ``silent`` nothing is sent."""

    def __init__(self, model: DistributedDataParallel):
        self.bytes_sent, self.num_collectives, self.silent = 0, 0, False
        self._buffers: dict[int, int] = {}
        model.register_comm_hook(None, self._all_reduce)

    @property
    def buffer_bytes(self) -> int:
        return sum(self._buffers.values())

    def _all_reduce(self, process_group: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        if bucket.index() == 0:
            self._buffers.clear()  # DDP cuts its buckets anew after the first backward
        size, num_workers = bucket.buffer().nbytes, dist.get_world_size()
        self._buffers[bucket.index()] = size
        if self.silent:
            bucket.buffer().div_(num_workers)  # as the other hook does
            return noop_hook(process_group, bucket)
        self.bytes_sent += int(sent_in_ring(size, num_workers, BOTH_WAYS))
        self.num_collectives += 1
        return allreduce_hook(process_group, bucket)


class _Local:
    """In the place of one of FSDP2's collectives, for a while."""

    def __init__(self, replaced):
        self.allocate = replaced.allocate


class _LocalGather(_Local):
    def __call__(self, output_tensor, input_tensor, group, async_op=False):
        for rank, shard in enumerate(output_tensor.view(group.size(), -1)):
            if rank != group.rank():  # the input is a view of that one
                shard.copy_(input_tensor)


class _LocalScatter(_Local):
    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        output_tensor.copy_(input_tensor.view(group.size(), -1)[group.rank()].view_as(output_tensor))


def expected_bytes(name: str, sdp: SDPConfig | None, model: PretrainedConfig, world_size: int) -> float:
    """Bytes that the worker with the most to send sends in a step, by formula, with one subnetwork a worker.
    fp32, without padding; see ``hf_sdp/estimate/figures.py``. DDP and FSDP2 are plans that hold everything.
    """
    config = sdp if sdp is not None else SDPConfig(coverage=1.0, reshard_after_forward=name == FSDP2)
    full = meta_model(model)
    plan = make_plan(full, config, world_size)
    figures = plan_figures(plan, full, config, num_workers=world_size, sequence=1, element_bytes=4)
    return float(figures.bytes_sent.max())
