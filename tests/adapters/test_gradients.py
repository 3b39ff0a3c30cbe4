"""Losses and gradients of a worker's adapters: those of the dense model in which what is not held is zero."""

import pytest
import torch

from hf_sdp import SDPConfig, patch_model
from hf_sdp.model.state import get_state, unwrap
from tests.support.models import batch_for, tiny_model
from tests.support.training import EVERYTHING

pytest.importorskip("peft")

LAYERS = {
    "llama": dict(**EVERYTHING),
    "fused and transposed": dict(task="causal", model_type="gpt2"),
    "in a decoder": dict(task="sequence to sequence", model_type="t5"),
    "convolutions": dict(task="image classification", model_type="resnet"),
}
ADAPTERS = {
    "lora": dict(),
    "rslora": dict(use_rslora=True, lora_bias=True),
    "dora": dict(use_dora=True),
    "other modules": dict(bias="lora_only", modules_to_save=["norm"]),
}
CASES = [
    ("llama", "lora"), ("llama", "rslora"), ("llama", "dora"), ("llama", "other modules"),
    ("fused and transposed", "lora"), ("fused and transposed", "dora"), ("in a decoder", "lora"),
    ("convolutions", "lora"), ("convolutions", "dora"),
]  # fmt: skip
TARGETS = {"convolutions": r".*convolution", "fused and transposed": ["c_attn", "c_proj", "c_fc"]}


def options_of(layers: str, adapters: str) -> dict:
    lora = {**ADAPTERS[adapters], "target_modules": TARGETS.get(layers, "all-linear")}
    return {**LAYERS[layers], "lora": lora | (dict(fan_in_fan_out=True) if "fused" in layers else {})}


def not_held_is_zero(model, plan, subnetwork: int) -> None:
    """Rows of A and of row-wise weights are zero, and outputs of layers that are cut column-wise: the weight itself is
    in the norm of a magnitude."""
    held = plan.held(subnetwork)
    for name, p in model.named_parameters():
        if name not in plan.cut:
            continue
        mask = torch.zeros(p.shape)
        for s in held[name]:
            mask.narrow(s.dim, s.start, s.stop - s.start).fill_(1)
        owner, dim = name.rpartition(".")[0], held[name][0].dim
        is_column = dim == (1 if type(model.get_submodule(owner)).__name__ == "Conv1D" else 0)
        if not is_column:
            p.data.mul_(mask)
        elif name.endswith("base_layer.weight"):
            of_outputs = mask.amax([other for other in range(p.dim()) if other != dim]).flatten()
            of_outputs = of_outputs.view((-1, 1, 1) if p.dim() == 4 else (-1,))
            layer = model.get_submodule(owner.removesuffix(".base_layer"))
            layer.register_forward_hook(lambda m, x, y, mask=of_outputs: y * mask)


@pytest.mark.parametrize("coverage", [0.75, pytest.param(0.5, marks=pytest.mark.long)])
@pytest.mark.parametrize(("layers", "adapters"), CASES)
def test_gradients_are_those_of_the_dense_model(layers, adapters, coverage):
    options = options_of(layers, adapters)
    for rank in (0, 2):
        worker = patch_model(tiny_model(**options), SDPConfig(coverage=coverage), rank=rank, world_size=4)
        plan, subnetwork = get_state(worker).held.plan, get_state(worker).held.subnetwork
        assert any("lora_A" in name for name in plan.cut) and any("lora_B" in name for name in plan.cut)
        dense = tiny_model(**options).get_base_model()
        not_held_is_zero(dense, plan, rank)
        batch = batch_for(dense, rank, options.get("task"))
        loss, expected = worker(**batch).loss, dense(**batch).loss
        loss.backward()
        expected.backward()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
        of_dense = dict(dense.named_parameters())
        learned = 0
        for name, p in unwrap(worker).named_parameters():
            region = subnetwork.tensors[name].region
            full = of_dense[region.name]
            assert p.requires_grad == full.requires_grad
            if full.grad is not None:
                torch.testing.assert_close(p.grad, region.of(full.grad), rtol=1e-4, atol=1e-5)
                learned += region.name in plan.cut
            else:
                assert p.grad is None
        assert learned
