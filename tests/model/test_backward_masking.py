"""Backward masking: the full model's gradients for what is held, compute and saved inputs only for that."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_sdp import SDPConfig, patch_model
from hf_sdp.model.state import get_state
from tests.support.models import batch, tiny_model


def backward_model(rank: int, dtype=torch.float32, **config):
    return patch_model(
        tiny_model(attention_bias=True, mlp_bias=True).to(dtype),
        SDPConfig(masking="backward", **config),
        rank=rank,
        world_size=4,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        dict(level="neuron"),
        dict(level="block"),
        dict(coverage=0.75),
        dict(coverage=0.25),
        dict(coverage=[0.75, 0.25, 0.25, 0.25]),  # units with one and with two holders
    ],
    ids=str,
)
def test_held_gradients_are_those_of_the_full_model(config, dtype):
    full = tiny_model(attention_bias=True, mlp_bias=True).to(dtype)
    expected = full(**batch(0), use_cache=False)
    expected.loss.backward()
    for rank in range(4):
        model = backward_model(rank, dtype, **config)
        output = model(**batch(0), use_cache=False)
        output.loss.backward()
        assert torch.equal(output.logits, expected.logits)  # the same kernels on the same shapes
        plan = get_state(model).held.plan
        for name, slices in plan.slices.items():
            got, want = model.get_parameter(name).grad, full.get_parameter(name).grad
            for s in slices:
                scale = 4 / len(s.holders)  # mean over the world -> mean over the holders
                got_slice, want_slice = (g.narrow(s.dim, s.start, s.stop - s.start) for g in (got, want))
                if rank not in s.holders:
                    assert got_slice.abs().max() == 0
                elif s.unit is None:  # shared: the same kernels on the same shapes
                    assert torch.equal(got_slice, want_slice), name
                elif got_slice.shape == got.shape and scale in (1, 2, 4):  # likewise; powers of two do not round
                    assert torch.equal(got_slice, want_slice * scale), name
                else:
                    torch.testing.assert_close(got_slice, want_slice * scale, **rounding(got, dtype))


def rounding(gradient: torch.Tensor, dtype: torch.dtype) -> dict[str, float]:
    """Tolerances for a slice's weight gradient against the slice of the full weight gradient.

    The two are matrix products of different shapes. A kernel may add up the 32 tokens of a product in another order
    for another shape, so sums differ by up to 32 roundings of the largest terms. They are added up in float32 or
    better. The sum and its product with the scale are then rounded to ``dtype`` once each.
    """
    added_up_in = torch.promote_types(dtype, torch.float32)
    largest = gradient.abs().max().item()
    return dict(rtol=2 * torch.finfo(dtype).eps, atol=32 * torch.finfo(added_up_in).eps * largest)


def saved_bytes(model) -> int:
    """Bytes saved for backward, each storage once, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in parameters:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            kept.append(t)
        return t

    kept: list = []  # alive, so that no address is used twice
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(**batch(0, size=4, length=64), use_cache=False).loss
    del loss
    return sum(storages.values())


def backward_flops(model) -> int:
    loss = model(**batch(0, size=4, length=64), use_cache=False).loss
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("level", ["neuron", "block"])
def test_weight_gradient_compute_falls_to_the_coverage(level):
    full = tiny_model()
    tokens, layers, hidden, neurons = 4 * 64, 4, 32, 64
    weight_gradients = 2 * tokens * layers * (4 * hidden * hidden + 3 * hidden * neurons)
    for rank in range(4):
        model = patch_model(tiny_model(), SDPConfig(level=level, masking="backward"), rank=rank, world_size=4)
        saved = backward_flops(full) - backward_flops(model)
        plan = get_state(model).held.plan
        share = (plan.numel(rank) - plan.shared_numel) / (plan.full_numel - plan.shared_numel)
        assert saved == pytest.approx((1 - share) * weight_gradients, rel=2e-3)


@pytest.mark.parametrize("level", ["neuron", "block"])
def test_inputs_are_saved_for_held_slices_only(level):
    full = saved_bytes(tiny_model())
    for rank in range(4):
        model = patch_model(tiny_model(), SDPConfig(level=level, masking="backward"), rank=rank, world_size=4)
        tokens, layers = 4 * 64, 4
        down_inputs = tokens * layers * 64 * 4  # bytes of the inputs of all down projections
        # Neuron level: half of every down projection's and output projection's input. Block level: none of them in
        # the blocks that are not held, half of the blocks.
        assert full - saved_bytes(model) >= 0.5 * down_inputs


def test_no_input_of_a_linear_layer_is_saved_in_a_block_that_is_not_held():
    for rank in (0, 1):
        model = patch_model(tiny_model(), SDPConfig(level="block", masking="backward"), rank=rank, world_size=4)
        plan = get_state(model).held.plan
        for index, layer in enumerate(model.model.layers):
            is_held = rank in plan.unit_holders[f"model.layers.{index}.mlp"][0]
            saved = []
            x = torch.randn(8, 32, requires_grad=True)
            with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
                y = layer.mlp(x)
            assert any(t.shape == x.shape for t in saved) == is_held
            y.sum().backward()
            assert x.grad is not None
            for p in layer.mlp.parameters():
                assert (p.grad.abs().max() > 0) == is_held


def test_weights_that_are_read_without_a_call_learn_as_all_others():
    """A Mamba mixer reads the weight of its convolution."""
    sizes = dict(model_type="mamba2", hidden_size=32, num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=8)
    full = tiny_model(**sizes)
    full(**batch(0), use_cache=False).loss.backward()
    model = patch_model(tiny_model(**sizes), SDPConfig(level="block", masking="backward"), rank=0, world_size=4)
    model(**batch(0), use_cache=False).loss.backward()
    plan = get_state(model).held.plan
    scales = set()
    for module in plan.modules:
        name = f"{module.name}.conv1d.weight"
        holders = plan.unit_holders[module.name][0]
        scale = plan.gradient_scale(holders) if 0 in holders else 0
        scales.add(scale)
        torch.testing.assert_close(model.get_parameter(name).grad, scale * full.get_parameter(name).grad)
    assert scales == {0, 2}
