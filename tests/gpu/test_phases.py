"""A coverage schedule on CUDA: N workers against N virtual ones, through the boundary."""

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_sdp import SDPAccelerator, SDPConfig, follow_schedule, patch_model, save_pretrained, verify
from hf_sdp.engine.sharded import get_sharded
from tests.support.models import batch, batch_for, tiny_model
from tests.support.oracle import OPTIMIZERS, compare
from tests.support.workers import run_workers

GROWS = [(0.0, 0.5), (0.5, 1.0)]
TWO_LAYERS = dict(num_hidden_layers=2)


@pytest.mark.parametrize(
    ("level", "optimizer", "sharding"), [("neuron", "fused adamw", "full"), ("block", "sgd", "none")]
)
def test_workers_equal_the_oracle_through_a_boundary(level, optimizer, sharding):
    config = dict(level=level, coverage_schedule=GROWS, sharding=sharding)
    compare(config, TWO_LAYERS, optimizer, steps=4, device="cuda")


RESNET = dict(task="image classification", model_type="resnet")


def images(model, index: int, device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in batch_for(model, index, RESNET["task"]).items()}


def train_resnet(folder) -> float:
    """Loss of the full model in evaluation. Of a ResNet this small, rounding changes a training: no oracle has it."""
    schedule = ["0:0.5", "0.3:0.5:masking=backward", "0.7:1"]
    accelerator = SDPAccelerator()
    model = patch_model(tiny_model(**RESNET), SDPConfig(level="neuron", coverage_schedule=schedule))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for step in range(6):
        accelerator.follow_schedule(step, 6)
        accelerator.backward(model(**images(model, step * 4 + accelerator.process_index, accelerator.device)).loss)
        optimizer.step()
        optimizer.zero_grad()
        assert {buffer.device for buffer in model.buffers()} == {accelerator.device}
    verify(model)  # of the statistics too
    save_pretrained(model, folder)
    with torch.no_grad():
        return model.eval()(**images(model, 99, accelerator.device)).loss.item()


def test_batch_norms_are_on_the_gpu_in_each_phase(tmp_path):
    found = run_workers(train_resnet, tmp_path / "saved", device="cuda")
    plain = AutoModelForImageClassification.from_pretrained(tmp_path / "saved").eval()
    fresh = tiny_model(**RESNET)
    means = [name for name in fresh.state_dict() if name.endswith("running_mean")]
    assert all((plain.state_dict()[name] - fresh.state_dict()[name]).abs().max() > 1e-3 for name in means)
    with torch.no_grad():
        assert found == pytest.approx([plain(**images(plain, 99, "cpu")).loss.item()] * 4, rel=1e-3)


def counts_at_a_boundary(optimizer: str):
    """Device and value of the counts of steps, before a boundary, after it, and after the next step."""
    accelerator = SDPAccelerator()
    model = patch_model(tiny_model(**TWO_LAYERS), SDPConfig(level="neuron", coverage_schedule=GROWS))
    model, prepared = accelerator.prepare(model, OPTIMIZERS[optimizer](model.parameters()))

    def step(index: int):
        inputs = {name: tensor.to(accelerator.device) for name, tensor in batch(index).items()}
        accelerator.backward(model(**inputs).loss)
        prepared.step()
        prepared.zero_grad()

    def counts():
        states = prepared.optimizer.state
        assert set(states) == set(get_sharded(model, "The test").parameters.values())
        for parameter, state in states.items():
            device = parameter.to_local().device
            assert device.type == accelerator.device.type
            assert all(state[key].device == device for key in ("exp_avg", "exp_avg_sq"))
        return {(state["step"].device.type, state["step"].item()) for state in states.values()}

    follow_schedule(model, 0, 2, [prepared])
    step(0)
    found = [counts()]
    assert follow_schedule(model, 1, 2, [prepared])
    found.append(counts())
    step(1)
    return [*found, counts()]


@pytest.mark.parametrize(("optimizer", "place"), [("fused adamw", "cuda"), ("adamw", "cpu")])
def test_counts_of_steps_stay_where_the_optimizer_has_them(optimizer, place):
    for of_worker in run_workers(counts_at_a_boundary, optimizer, device="cuda"):
        assert of_worker == [{(place, 1.0)}, {(place, 1.0)}, {(place, 2.0)}]
