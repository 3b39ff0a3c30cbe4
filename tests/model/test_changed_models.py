"""What hosts and users do to a patched model: its evaluation stays that of the full model."""

import copy
from collections.abc import Callable
from types import MethodType

import pytest
import torch
from accelerate.utils import extract_model_from_parallel

import hf_sdp
from hf_sdp import SDPAccelerator, SDPConfig, SDPConfigError, SDPStateError, patch_model
from hf_sdp.model.cut import CutModule
from tests.support.models import batch, tiny_model
from tests.support.workers import run_workers

CONFIGS = {
    "neuron": dict(level="neuron", coverage=0.5),
    "several parts": dict(level="neuron", coverage=0.75),
    "block": dict(level="block", coverage=0.5),
    "layer": dict(level="block", block_granularity="layer", coverage=0.5),
}
BOUNDARIES = {
    "neuron to full": dict(coverage_schedule=[(0.0, 0.5), (0.5, 1.0)]),
    "full to neuron": dict(coverage_schedule=[(0.0, 1.0), (0.5, 0.5)]),
    "neuron to block": dict(coverage_schedule=["0:0.5", "0.5:0.5:level=block"]),
    "block to neuron": dict(coverage_schedule=["0:0.5:level=block", "0.5:0.5:level=neuron"]),
}


def prepared(sdp: dict, **model):
    accelerator = SDPAccelerator(cpu=True)
    net = patch_model(tiny_model(num_hidden_layers=4, **model), SDPConfig(**sdp))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return (accelerator, *accelerator.prepare(net, optimizer))


def step(accelerator, model, optimizer) -> None:
    accelerator.backward(model.train()(**batch(accelerator.process_index)).loss)
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def full_model(model, **overrides):
    """What a checkpoint of it would be, on every worker."""
    box = [hf_sdp.consolidate(model)]
    torch.distributed.broadcast_object_list(box)
    plain = tiny_model(num_hidden_layers=4, **overrides).eval()
    plain.load_state_dict(box[0])
    return plain


def evaluate_changed(sdp: dict):
    accelerator, model, optimizer = prepared(sdp, attn_implementation="eager")
    step(accelerator, model, optimizer)
    plain = full_model(model, attn_implementation="eager")
    with torch.no_grad():
        expected = plain(**batch(9), output_attentions=True)
        found = model(**batch(9), output_attentions=True)
        assert torch.equal(found.logits, expected.logits)
        assert len(found.attentions) == 4 and all(map(torch.equal, found.attentions, expected.attentions))

        # A loss of one's own, and hooks on modules that are cut and on those in them.
        model.loss_function = plain.loss_function = lambda logits, labels, **kwargs: (logits**2).sum()
        assert torch.equal(model(**batch(9)).loss, plain(**batch(9)).loss)
        del model._loss_function, plain._loss_function
        outputs = {model: [], plain: []}
        for each, seen in outputs.items():
            for name in ("model.layers.1.mlp", "model.layers.2.mlp.down_proj", "model.layers.0.self_attn.q_proj"):
                each.get_submodule(name).register_forward_hook(lambda m, a, out, seen=seen: seen.append(out))
            each(**batch(9))
        assert len(outputs[model]) == 3 and all(map(torch.equal, outputs[model], outputs[plain]))

        # A forward that is replaced on the instance, and calls the base model and reads the head.
        def forward(self, input_ids, **kwargs):
            return torch.nn.functional.linear(self.base_model(input_ids).last_hidden_state, self.lm_head.weight)

        model.forward = MethodType(forward, model)
        assert torch.equal(model(**batch(9)), expected.logits)
        del model.forward

        # Accelerate's autocast wrapper is taken off by following __wrapped__.
        model._original_forward, model.forward = type(plain).forward, model.forward
        assert torch.equal(extract_model_from_parallel(model, keep_fp32_wrapper=False)(**batch(9)).logits, found.logits)

        # Replaced forwards of cut modules.
        for each in (model, plain):
            for layer in each.model.layers:
                layer.mlp.__dict__["forward"] = MethodType(silent_mlp, layer.mlp)
        assert torch.equal(model(**batch(9)).logits, plain(**batch(9)).logits)
        assert not torch.equal(model(**batch(9)).logits, expected.logits)
    cut = next(module for module in model.modules() if isinstance(module, CutModule))
    for alone in (model.base_model, cut):
        with pytest.raises(SDPStateError, match="call the model itself|called on its own"):
            alone(torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(SDPStateError, match="consolidate"):
        model.state_dict()
    assert hf_sdp.local_state_dict(model).keys() == dict(model.named_parameters()).keys() | {"lm_head.weight"}
    model.train()(**batch(1)).loss.backward()  # nothing of the evaluation is left


def silent_mlp(self, x):
    return 0.5 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.parametrize("sdp", CONFIGS.values(), ids=CONFIGS)
def test_evaluation_is_of_the_full_model_whatever_is_replaced(sdp):
    run_workers(evaluate_changed, sdp)


def computed_anew(mlp):
    """As Liger does, by what is computed anyway."""
    return MethodType(lambda self, x: 2 * silent_mlp(self, x), mlp)


def wrapped(mlp):
    """As Accelerate's hooks do, which call the forward that was there."""
    original = mlp.forward
    return lambda x: 2 * original(0.5 * x + 0.5 * x) / 2


def train_with_replaced_forwards(sdp: dict, replaced_by: Callable | None):
    accelerator, model, optimizer = prepared(sdp)
    if replaced_by is not None:
        for layer in model.model.layers:
            layer.mlp.forward = replaced_by(layer.mlp)
    for number in range(2):
        hf_sdp.follow_schedule(model, number, 2, [optimizer.optimizer])
        step(accelerator, model, optimizer)
    with torch.no_grad():
        return model(**batch(9)).logits


@pytest.mark.parametrize("replaced_by", [computed_anew, wrapped])
@pytest.mark.parametrize("sdp", [*CONFIGS.values(), *BOUNDARIES.values()], ids=[*CONFIGS, *BOUNDARIES])
def test_a_replaced_forward_of_a_cut_module_is_used_in_training(sdp, replaced_by):
    kept, replaced = (run_workers(train_with_replaced_forwards, sdp, by)[0] for by in (None, replaced_by))
    torch.testing.assert_close(kept, replaced, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sdp", CONFIGS.values(), ids=CONFIGS)
def test_a_copy_of_a_patched_model_is_a_model_of_its_own(sdp):
    model = patch_model(tiny_model(), SDPConfig(**sdp), rank=1, world_size=4)
    reference = copy.deepcopy(model)
    before = model(**batch(0)).loss
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert torch.equal(reference(**batch(0)).loss, before)
    assert not torch.equal(model(**batch(0)).loss, before)
    assert hf_sdp.local_state_dict(reference).keys() == hf_sdp.local_state_dict(model).keys()


def mixed_dtypes(sdp: dict) -> tuple:
    """A bfloat16 model with float32 norms, under autocast."""
    accelerator = SDPAccelerator(cpu=True, mixed_precision="bf16")
    net = with_float32_norms(tiny_model(num_hidden_layers=4))
    net = patch_model(net, SDPConfig(**sdp))
    return accelerator, *accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))


def with_float32_norms(model):
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data = parameter.data.bfloat16()
    return model


def evaluate_mixed_dtypes(sdp: dict):
    accelerator, model, optimizer = mixed_dtypes(sdp)
    step(accelerator, model, optimizer)
    plain = with_float32_norms(full_model(model))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(**batch(9)).logits, plain(**batch(9)).logits.float())


@pytest.mark.parametrize("coverage", [0.5, 0.75])
def test_norms_of_another_dtype_are_evaluated_as_they_are(coverage):
    run_workers(evaluate_mixed_dtypes, dict(coverage=coverage))


def refuse_mixed_dtypes(sdp: dict):
    with pytest.raises(SDPConfigError, match="layernorm.weight is float32"):
        mixed_dtypes(sdp)


def test_dtypes_that_one_group_cannot_have_are_refused_before_the_training():
    run_workers(refuse_mixed_dtypes, CONFIGS["block"])
