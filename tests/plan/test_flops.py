"""FLOPs counted in a recording against those of the model that runs."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_sdp import SDPConfig, make_plan
from hf_sdp.families import structure_of
from hf_sdp.families.attention import set_attention
from hf_sdp.families.flops import flops_of
from hf_sdp.plan.flops import forward_flops, training_flops
from tests.support.models import batch_for, tiny_model
from tests.support.types import MODELS, short

LENGTH = 32  # of batch_for


@pytest.mark.parametrize("name", short("gpt2", "deepseek_v3", "t5"))
def test_a_forward_takes_what_was_counted(name):
    model = tiny_model(**MODELS[name]).eval()
    set_attention(model, "eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    inputs = batch_for(model, 0, MODELS[name]["task"])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**inputs)
    layers = structure_of(model).layers
    counted = flops_of(model, LENGTH)
    total = counted.within(layers) + counted.outside(layers, layers)
    # Angles of positions are not counted; older versions of transformers compute them with a product.
    angles = sum(sum(of.values()) for module, of in counter.get_flop_counts().items() if "rotary_emb" in module)
    assert 2 * LENGTH * total.all == counter.get_total_flops() - angles


def test_six_for_each_weight_and_twelve_for_attention():
    model = tiny_model(num_attention_heads=8)
    plan = make_plan(model, SDPConfig(level="neuron"), 4)
    for module in plan.modules:
        weights = sum(model.get_parameter(name).numel() for name in module.dims)
        for length in (16, 48):
            quadratic = 12 * model.config.hidden_size * length if module.kind == "attention" else 0
            assert training_flops(module, flops_of(model, length)) == 6 * weights + quadratic
            assert forward_flops(module, flops_of(model, length)).of_weights == 2 * weights


def test_of_experts_those_that_a_token_is_sent_to():
    model = tiny_model(**MODELS["mixtral"])
    plan = make_plan(model, SDPConfig(level="block"), 2)
    experts = next(module for module in plan.modules if module.kind == "experts")
    of_all = sum(p.numel() for n, p in model.get_submodule(experts.name).named_parameters() if "experts" in n)
    chosen = of_all * model.config.num_experts_per_tok / model.config.num_local_experts
    router = model.config.hidden_size * model.config.num_local_experts
    assert training_flops(experts, flops_of(model, LENGTH)) == 6 * (chosen + router)
