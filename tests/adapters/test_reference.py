"""A loss against a reference: what trains, with its adapters off or with others, in training mode without gradients."""

import pytest
import torch

from hf_sdp import SDPAccelerator, SDPConfig, patch_model
from tests.support.models import batch, tiny_model
from tests.support.workers import run_workers

pytest.importorskip("peft")


def with_a_copy():
    model = tiny_model(lora={})
    model.add_adapter("ref", model.peft_config["default"])  # B is zero: as if they were off
    return model


def train(sdp: dict, order: str, reference: str | None):
    """Losses of what trains, and of the reference. ``order``: in which they are computed."""
    accelerator = SDPAccelerator(cpu=True)
    model = patch_model(with_a_copy(), SDPConfig(**sdp))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    losses: dict[str, list[float]] = {"held": [], "reference": []}
    for step in range(3):
        for what in order.split():
            if what == "held":
                loss = model(**batch(step)).loss
                losses[what].append(loss.item())
            elif reference == "off":
                with torch.no_grad(), model.disable_adapter():
                    losses[what].append(model(**batch(step)).loss.item())
            elif reference == "copy":
                model.set_adapter("ref")
                with torch.no_grad():
                    losses[what].append(model(**batch(step)).loss.item())
                model.set_adapter("default")
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return losses["held"], losses["reference"]


@pytest.mark.parametrize(
    "sdp", [dict(coverage=0.5), dict(level="block", reshard_after_forward=True), dict(masking="backward")], ids=str
)
@pytest.mark.parametrize(
    ("order", "reference"),
    [
        ("held reference", "off"),
        ("reference held", "copy"),
        pytest.param("reference held", "off", marks=pytest.mark.long),
        pytest.param("held reference", "copy", marks=pytest.mark.long),
    ],
)
def test_the_reference_is_the_full_model_and_changes_nothing(sdp, order, reference):
    with torch.no_grad():
        full = [tiny_model()(**batch(step)).loss.item() for step in range(3)]
    alone, _ = run_workers(train, sdp, order, None, world_size=2)[0]
    losses, found = run_workers(train, sdp, order, reference, world_size=2)[0]
    assert losses == pytest.approx(alone, abs=1e-6) and losses[0] != losses[2]
    assert found == pytest.approx(full, abs=1e-5)


@pytest.mark.parametrize("config", [dict(level="block"), dict(coverage=0.5)], ids=str)
def test_the_reference_of_a_simulation(config):
    model = patch_model(with_a_copy(), SDPConfig(simulate=2, **config)).train()
    with torch.no_grad(), model.disable_adapter():
        found = model(**batch(0)).loss
    full = tiny_model()(**batch(0)).loss
    assert found.item() == pytest.approx(full.item(), abs=1e-6) and model(**batch(0)).loss != full
