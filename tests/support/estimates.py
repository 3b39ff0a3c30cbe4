"""What a step is predicted to take, against what a real engine takes on torch's fake process group."""

import pytest
import torch

from hf_sdp import SDPConfig
from hf_sdp.bench.fake_world import fake_world, measure_steps, parallelize
from hf_sdp.estimate.memory import Step
from hf_sdp.workload import Workload


def compare(step: Step, model: torch.nn.Module, engine: SDPConfig | str, workload: Workload, world: int, rank: int):
    """State and traffic to the byte, the peak within 1%. The model is not to be used any more."""
    if workload.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mixed = workload.dtype != workload.param_dtype
    device = torch.device("cpu")
    with fake_world(world, rank):
        model, optimizer = parallelize(model, engine, device, workload.dtype if mixed else None)
        batches = [(workload.batch, workload.sequence)]
        (measured,) = measure_steps(model, optimizer, batches, device, autocast=mixed and engine == "DDP")
    memory = step.memory
    assert (memory.parameters, memory.gradients, memory.optimizer) == tuple(
        measured[kind] for kind in ("parameters", "gradients", "optimizer")
    )
    peak = measured["parameters"] + measured["optimizer"] + measured["buckets"] + measured["step"]
    assert memory.peak == pytest.approx(peak, rel=0.01)
    parts = (
        memory.parameters,
        memory.optimizer,
        memory.gathered_at_peak,
        memory.activations_at_peak,
        memory.gradients_at_peak,
    )
    assert memory.peak == sum(parts)
    if isinstance(engine, SDPConfig):
        assert step.bytes_sent == measured["bytes_sent"]
