"""Patching without processes: shapes, names, gradients against the dense model, errors before any change."""

import inspect
import math
import re

import pytest
import torch
from transformers import LlamaForCausalLM, MobileNetV1Config, MobileNetV1ForImageClassification

from hf_sdp import SDPConfig, SDPConfigError, SDPStateError, make_plan, patch_model
from hf_sdp.model.state import get_state
from tests.support.models import batch, tiny_config, tiny_model

MODELS = {
    "plain": {},
    "grouped": dict(num_attention_heads=8, num_key_value_heads=4),
    "biases": dict(attention_bias=True, mlp_bias=True),
    "tied": dict(tie_word_embeddings=True),
}
SUBNETWORKS = {
    "neuron": dict(level="neuron"),
    "neuron 3/4": dict(level="neuron", coverage=0.75),
    "neuron 1/4": dict(level="neuron", coverage=0.25),
    "block": dict(level="block"),
    "block 3/4": dict(level="block", coverage=0.75),
    "layer": dict(level="block", block_granularity="layer"),
    "everything": dict(coverage=1.0),
}


def masked_dense(model_options: dict, plan, subnetwork: int) -> LlamaForCausalLM:
    """The full model with every slice that the subnetwork does not hold set to zero. Nothing of hf_sdp runs in it.

    A zeroed attention or MLP adds nothing to the residual stream, which is what absence means."""
    model = tiny_model(**model_options)
    with torch.no_grad():
        for name, slices in plan.slices.items():
            for s in slices:
                if subnetwork not in s.holders:
                    model.get_parameter(name).narrow(s.dim, s.start, s.stop - s.start).zero_()
    return model


@pytest.mark.parametrize("subnetwork_options", SUBNETWORKS)
@pytest.mark.parametrize("model_options", MODELS)
def test_forward_masking_gradients_equal_those_of_the_masked_dense_model(model_options, subnetwork_options):
    options, config = MODELS[model_options], SDPConfig(**SUBNETWORKS[subnetwork_options])
    plan = make_plan(tiny_config(**options), config, 4)
    for rank in range(4):
        dense = masked_dense(options, plan, rank)
        expected = dense(**batch(3), use_cache=False)
        expected.loss.backward()
        model = patch_model(tiny_model(**options), config, rank=rank, world_size=4)
        got = model(**batch(3))
        got.loss.backward()
        torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-5)
        state = get_state(model)
        assert sum(p.numel() for p in model.parameters()) == plan.numel(rank)  # physically smaller
        seen = 0
        for local_name, p in model.named_parameters():
            region = state.held.subnetwork.tensors[local_name].region
            full_gradient = dense.get_parameter(region.name).grad
            torch.testing.assert_close(p.grad, region.of(full_gradient), rtol=1e-4, atol=1e-6)
            seen += p.numel()
        assert seen == plan.numel(rank)


def test_names_stay_and_features_are_true():
    model = tiny_model()
    names = [n for n, _ in model.named_modules()]
    signature = inspect.signature(model.forward)
    mlp = model.model.layers[0].mlp
    patch_model(model, SDPConfig(), rank=1, world_size=4)
    assert [n for n, _ in model.named_modules()] == names
    assert model.model.layers[0].mlp is mlp
    assert (mlp.up_proj.in_features, mlp.up_proj.out_features) == (32, 32) == tuple(mlp.up_proj.weight.shape)
    assert (mlp.down_proj.in_features, mlp.down_proj.out_features) == (32, 32)
    attention = model.model.layers[0].self_attn
    assert (attention.q_proj.out_features, attention.o_proj.in_features) == (16, 16)
    assert inspect.signature(model.forward) == signature  # the Trainer picks dataset columns by it
    assert (
        mlp.up_proj.weight.untyped_storage().nbytes() == 32 * 32 * 4
    )  # a tensor of its own, not a view of the full one


def test_a_module_in_several_parts_has_parts_and_the_bias_once():
    model = patch_model(tiny_model(mlp_bias=True), SDPConfig(coverage=0.75), rank=0, world_size=4)
    mlp = model.model.layers[0].mlp
    assert len(mlp.up_proj.parts) == len(mlp.down_proj.parts) == 3
    assert (mlp.up_proj.out_features, mlp.down_proj.in_features) == (48, 48)
    assert [n for n, _ in mlp.named_parameters() if "down_proj" in n and "bias" in n] == ["down_proj.shared_bias.bias"]


def test_a_cache_is_refused_and_off_by_default():
    """Two parts of one attention would append to the same cache layer."""
    model = patch_model(tiny_model(), SDPConfig(coverage=0.75), rank=0, world_size=4)
    assert model(**batch(0)).past_key_values is None
    with pytest.raises(SDPConfigError, match="use_cache"):
        model(**batch(0), use_cache=True)


def test_evaluation_before_prepare_is_an_error_not_a_subnetwork():
    model = patch_model(tiny_model(), SDPConfig(), rank=0, world_size=4).eval()
    with pytest.raises(SDPStateError, match="prepare"):
        model(**batch(0))


def test_reentrant_checkpointing_is_refused():
    model = tiny_model()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(SDPConfigError, match="use_reentrant"):
        patch_model(model, SDPConfig(), rank=0, world_size=2)


def _meta_model():
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_config())


def _mobilenet():
    return MobileNetV1ForImageClassification(MobileNetV1Config(depth_multiplier=0.25))


@pytest.mark.parametrize(
    ("make", "config", "world", "message"),
    [
        (tiny_model, SDPConfig(), dict(rank=0, world_size=1), "at least 2 workers"),
        (tiny_model, SDPConfig(), dict(), "No process group"),
        (tiny_model, SDPConfig(), dict(rank=4, world_size=4), "0 <= rank < world_size"),
        (
            tiny_model,
            SDPConfig(num_subnetworks=3),
            dict(rank=0, world_size=4),
            f"does not divide.*{re.escape('[1, 2, 4]')}",
        ),
        (tiny_model, SDPConfig(coverage=0.3), dict(rank=0, world_size=4), "Nearest coverage"),
        (tiny_model, SDPConfig(simulate=4), dict(rank=0, world_size=4), "simulate=4"),
        (tiny_model, {"level": "neuron"}, dict(rank=0, world_size=4), "must be an SDPConfig"),
        (_mobilenet, SDPConfig(), dict(rank=0, world_size=4), "MobileNetV1.*has no stack of layers"),
        (_meta_model, SDPConfig(), dict(rank=0, world_size=4), "meta device"),
        (lambda: torch.nn.Linear(2, 2), SDPConfig(), dict(rank=0, world_size=4), "transformers model"),
    ],
)
def test_errors_come_before_any_change(make, config, world, message):
    model = make()
    before = {n: (p, p.shape, p._version) for n, p in model.named_parameters()}
    forward = model.forward
    with pytest.raises(SDPConfigError, match=message):
        patch_model(model, config, **world)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[n] is p and p.shape == shape and p._version == v for n, (p, shape, v) in before.items())
    assert model.forward == forward


def test_a_second_patch_is_an_error():
    model = patch_model(tiny_model(), SDPConfig(), rank=0, world_size=2)
    numel = sum(math.prod(p.shape) for p in model.parameters())
    with pytest.raises(SDPConfigError, match="already patched"):
        patch_model(model, SDPConfig(), rank=0, world_size=2)
    assert sum(math.prod(p.shape) for p in model.parameters()) == numel


class Doubling(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _with_a_subclass():
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.__class__ = Doubling
    return model


def test_a_subclass_of_linear_is_refused_where_it_would_be_cut():
    for masking in ("forward", "backward"):
        with pytest.raises(SDPConfigError, match=r"layers.1.mlp.up_proj \(Doubling\).*no subclass. Use level='block'"):
            patch_model(_with_a_subclass(), SDPConfig(masking=masking), rank=0, world_size=4)


@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_a_subclass_of_linear_keeps_its_forward_at_block_level(masking):
    config = SDPConfig(level="block", masking=masking, coverage=1.0)
    model = patch_model(_with_a_subclass(), config, rank=0, world_size=4)
    torch.testing.assert_close(model(**batch(0)).loss, _with_a_subclass()(**batch(0)).loss, rtol=0, atol=0)


@pytest.mark.parametrize("options", [dict(), dict(masking="backward"), dict(simulate=4)], ids=str)
def test_hooks_of_linear_layers_stay(options):
    model, calls = tiny_model(), []
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *args: calls.append("after"))
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda *args: calls.append("before"))
    world = {} if "simulate" in options else dict(rank=0, world_size=4)
    patch_model(model, SDPConfig(**options), **world)
    model(**batch(0))
    assert calls == ["after", "before"]


def test_hooks_of_parameters_are_refused():
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        model = tiny_model()
        getattr(model.lm_head.weight, register)(lambda *args: None)
        with pytest.raises(SDPConfigError, match="lm_head.weight has a hook for its gradient"):
            patch_model(model, SDPConfig(), rank=0, world_size=4)


def test_hooks_of_layers_in_several_parts_see_all_that_is_held():
    """Also those that are registered after patching."""
    model = patch_model(tiny_model(), SDPConfig(coverage=0.75), rank=0, world_size=4)
    mlp, seen = model.model.layers[0].mlp, {}
    for name in ("up_proj", "down_proj"):
        mlp.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: seen.update({name: (args[0].shape[-1], output.shape[-1])})
        )
    model(**batch(0))
    assert seen == {"up_proj": (32, 48), "down_proj": (48, 32)}


@pytest.mark.parametrize(
    ("workers", "rank", "warns"), [(2, 0, True), (2, 1, False), (4, 0, False)], ids=["apart", "once", "connected"]
)
def test_workers_that_share_no_unit_are_warned_of(workers, rank, warns, caplog):
    patch_model(tiny_model(), SDPConfig(coverage=0.5), rank=rank, world_size=workers)
    assert ("coverage 0.5 of 2 subnetworks there are 2 groups that share no unit" in caplog.text) == warns
