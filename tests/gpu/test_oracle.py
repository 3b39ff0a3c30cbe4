"""N workers over NCCL against N virtual workers on the same GPU, and against DDP where all hold everything."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.support.models import batch, tiny_model
from tests.support.oracle import OPTIMIZERS, TOLERANCE, compare, train_workers
from tests.support.workers import run_workers

TWO_LAYERS = dict(num_hidden_layers=2)
RESHARD, NONE = dict(reshard_after_forward=True), dict(sharding="none")


@pytest.mark.parametrize(
    ("level", "masking", "sharding", "optimizer", "accumulation"),
    [
        ("neuron", "forward", {}, "fused adamw", 3),
        ("neuron", "forward", RESHARD, "sgd", 1),
        ("neuron", "backward", NONE, "fused adamw", 1),
        ("neuron", "backward", RESHARD, "sgd", 3),
        ("block", "forward", NONE, "sgd", 3),
        ("block", "forward", RESHARD, "fused adamw", 3),
        ("block", "backward", {}, "fused adamw", 1),
    ],
)
def test_workers_equal_the_oracle(level, masking, sharding, optimizer, accumulation):
    config = dict(level=level, masking=masking, coverage=0.5, **sharding)
    compare(config, TWO_LAYERS, optimizer, accumulation, steps=3, device="cuda")


def train_ddp(optimizer: str, steps: int):
    """As ``train_workers`` of the oracle, without SDP."""
    model = DistributedDataParallel(tiny_model(**TWO_LAYERS).to(torch.cuda.current_device()))
    stepped = OPTIMIZERS[optimizer](model.parameters())
    norms, losses = [], []
    for step in range(steps):
        inputs = batch(step * dist.get_world_size() + dist.get_rank())
        loss = model(**{name: tensor.to("cuda") for name, tensor in inputs.items()}).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        stepped.step()
        stepped.zero_grad()
    return norms, losses, {name: value.cpu() for name, value in model.module.state_dict().items()}


@pytest.mark.parametrize(("level", "optimizer"), [("neuron", "sgd"), ("block", "fused adamw")])
def test_coverage_of_one_is_ddp(level, optimizer):
    config, steps = dict(level=level, coverage=1.0), 3
    ours = run_workers(train_workers, config, TWO_LAYERS, optimizer, 1, steps, device="cuda")
    ddp = run_workers(train_ddp, optimizer, steps, device="cuda")
    for (norms, losses, _), (norms_of_ddp, losses_of_ddp, _) in zip(ours, ddp, strict=True):
        assert losses == pytest.approx(losses_of_ddp, abs=1e-5)
        assert norms == pytest.approx(norms_of_ddp, rel=1e-4)
    assert ours[0][2].keys() == ddp[0][2].keys()
    for name, expected in ddp[0][2].items():
        torch.testing.assert_close(ours[0][2][name], expected, rtol=0, atol=TOLERANCE[optimizer], msg=name)
