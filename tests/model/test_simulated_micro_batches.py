"""Which subnetwork a simulation trains: that of the micro-batch, however often the model is called."""

import pytest
import torch

from hf_sdp import SDPAccelerator, SDPConfig, patch_model
from tests.support.models import batch, tiny_model

N = 4


def simulated(level="block", masking="forward"):
    model = patch_model(tiny_model(num_hidden_layers=4), SDPConfig(level=level, masking=masking, simulate=N))
    return model, model._sdp_state.run.cursor


def plain_call(model, cursor, index):
    model(**batch(index)).loss.backward()


def two_forwards(model, cursor, index):
    """One backward of two losses: preferences, R-Drop."""
    (model(**batch(index)).loss + model(**batch(index + 100)).loss).backward()


def one_without_gradient(model, cursor, index):
    with torch.no_grad():
        model(**batch(index))
    model(**batch(index)).loss.backward()


def one_in_vain(model, cursor, index):
    model(**batch(index))
    model(**batch(index)).loss.backward()


def evaluated_between(model, cursor, index):
    model.eval()(**batch(index))
    model.train()(**batch(index)).loss.backward()


def replaced_forward(model, cursor, index):
    if "forward" not in vars(model):
        original = model.forward
        model.forward = lambda **inputs: original(**inputs)
    model(**batch(index)).loss.backward()


@pytest.mark.parametrize("masking", ["forward", "backward"])
@pytest.mark.parametrize(
    "micro_batch",
    [plain_call, two_forwards, one_without_gradient, one_in_vain, evaluated_between, replaced_forward],
)
def test_a_micro_batch_ends_with_its_backward(micro_batch, masking):
    model, cursor = simulated(masking=masking)
    trained = []
    for index in range(6):
        micro_batch(model, cursor, index)
        trained.append(cursor.subnetwork)
    assert trained == [0, 1, 2, 3, 0, 1]


def test_accelerate_says_which_micro_batch_it_is():
    """Two forwards and backwards per micro-batch, and a window that ends early."""
    accelerator = SDPAccelerator(cpu=True, gradient_accumulation_steps=N)
    model, cursor = simulated()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    trained = []
    for index in range(6):
        with accelerator.accumulate(model):
            for _ in range(2):
                accelerator.backward(model(**batch(index)).loss)
                trained.append(cursor.subnetwork)
            optimizer.step()
            optimizer.zero_grad()
    assert trained == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1]


@pytest.mark.parametrize("level", ["neuron", "block"])
def test_a_module_in_eval_mode_computes_what_the_model_does(level):
    """As users freeze norms: the mode of the model decides, as with real workers."""
    expected, _ = simulated(level)
    model, _ = simulated(level)
    model.train()
    expected.train()
    for name in ("model.layers.0.mlp", "model.layers.1.self_attn", "model.layers.2"):
        model.get_submodule(name).eval()
    assert model.training and not model.model.layers[2].mlp.training
    for index in range(N):
        assert torch.equal(model(**batch(index)).loss, expected(**batch(index)).loss)
