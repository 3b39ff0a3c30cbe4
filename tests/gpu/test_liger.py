"""Liger's kernels (Triton, fused linear cross-entropy) under SDP: the same losses as without them."""

import pytest

import hf_sdp
from hf_sdp.bench.workers import launch
from tests.support.trainer import losses_of, make_trainer
from tests.support.workers import compute_exactly

RUN = dict(use_cpu=False, max_steps=4)
TWO_LAYERS = dict(num_hidden_layers=2)


def train(folder, sdp: dict, liger: str | None):
    """``liger``: "before" the model is made (other classes), or "after" it was patched (by the Trainer)."""
    compute_exactly()
    hf_sdp.enable()
    if liger == "before":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    trainer = make_trainer(folder, sdp, {**RUN, "use_liger_kernel": liger == "after"}, TWO_LAYERS)
    trainer.train()
    forwards = (trainer.model.forward, trainer.model.model.layers[0].mlp.forward)
    used = [forward.__func__.__globals__["__name__"].startswith("liger_kernel") for forward in forwards]
    return losses_of(trainer.state.log_history), trainer.evaluate()["eval_loss"], used


@pytest.mark.parametrize("sdp", [dict(level="neuron"), dict(level="block"), dict(masking="backward")], ids=str)
def test_its_losses_are_those_without_it(tmp_path, sdp):
    pytest.importorskip("liger_kernel")
    losses, evaluation, used = launch(train, 4, tmp_path, sdp, None, device="cuda", timeout_s=100)[0]
    assert used == [False, False] and losses[-1] < losses[0]
    for liger in ("before", "after"):
        with_it = launch(train, 4, tmp_path, sdp, liger, device="cuda", timeout_s=100)[0]
        print(liger, with_it)
        assert any(with_it[2])
        assert with_it[0] == pytest.approx(losses, rel=1e-3)
        assert with_it[1] == pytest.approx(evaluation, rel=1e-3)
