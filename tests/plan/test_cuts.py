"""How blocks are cut, where the shapes of their weights do not say it."""

import copy
import functools

import pytest
import torch
import transformers
from packaging.version import Version
from transformers.models.umt5 import modeling_umt5 as umt5

from hf_sdp import SDPConfig, make_plan
from hf_sdp.bench.support.tiny import tiny_config
from hf_sdp.families import cuts_of
from hf_sdp.families.layers import _is_linear, likeness
from hf_sdp.families.meta_model import meta_model

IS_OLD = Version(transformers.__version__) < Version("5.23")
THREE = ((0, 64), (64, 128), (128, 192))


def cut(model_type: str, kind: str):
    """Of the first block of a kind."""
    cuts = cuts_of(meta_model(tiny_config(model_type)))
    return next(c for of_block in cuts.values() if not isinstance(of_block, str) for c in of_block if c.kind == kind)


def last_names(of: dict) -> dict:
    return {name.partition(".0.")[2]: value for name, value in of.items()}


def test_fused_projections_are_cut_as_they_are_read():
    """GPT-2 has all queries, then all keys, then all values; GPT-NeoX has them head by head."""
    one_by_one, by_head = cut("gpt2", "attention"), cut("gpt_neox", "attention")
    assert last_names(one_by_one.packed) == {"attn.c_attn.weight": THREE, "attn.c_attn.bias": THREE}
    assert not by_head.packed and one_by_one.units == by_head.units == 8
    assert last_names(cut("phi3", "mlp").packed) == {"mlp.gate_up_proj.weight": ((0, 128), (128, 256))}


def test_transposed_weights_are_cut_along_the_other_dim():
    dims = last_names(cut("gpt2", "mlp").dims)
    assert dims == {"mlp.c_fc.weight": 1, "mlp.c_fc.bias": 0, "mlp.c_proj.weight": 0}


def test_latent_attention_is_cut_where_heads_come_apart():
    dims = last_names(cut("deepseek_v3", "attention").dims)
    assert {name.split(".")[1] for name in dims} == {"q_b_proj", "kv_b_proj", "o_proj"}


@pytest.mark.skipif(IS_OLD, reason="this transformers has no experts that know of expert parallelism: all hold them")
def test_experts_are_rows_and_those_beside_them_have_neurons():
    experts, beside = cut("qwen2_moe", "experts"), cut("qwen2_moe", "mlp")
    assert last_names(experts.dims) == {"mlp.experts.gate_up_proj": 0, "mlp.experts.down_proj": 0}
    assert experts.units == 4 and beside.name.endswith("shared_expert")


@pytest.mark.parametrize(
    ("model_type", "argument", "of_heads"),
    [
        ("t5", "position_bias", (1, 8)),
        ("mpt", "position_bias", (0, 8)),
        ("bloom", "alibi", (0, 8)),  # batch and heads are one dim
        ("mpnet", "position_bias", (1, 8)),
    ],
)
def test_position_biases_of_all_layers_are_cut_where_a_layer_gets_them(model_type, argument, of_heads):
    arguments = cut(model_type, "attention").arguments
    assert list(arguments.values()) == [{argument: of_heads}]


def test_a_table_of_position_biases_is_cut_where_each_layer_has_its_own():
    found = cut("umt5", "attention")
    table = next(name for name in found.dims if "bias" in name)
    assert found.dims[table] == 1 and not found.arguments


def test_a_table_that_is_read_without_its_module_is_not_cut(monkeypatch):
    """Nobody would put its parts together, or mask its gradient."""

    def read(embedding, index):
        return torch.nn.functional.embedding(index, embedding.weight)

    compute_bias = umt5.UMT5Attention.compute_bias

    def without_a_call(self, *args, **kwargs):
        embedding = self.relative_attention_bias
        del self._modules["relative_attention_bias"]
        vars(self)["relative_attention_bias"] = functools.partial(read, embedding)
        self.relative_attention_bias.weight = embedding.weight
        try:
            return compute_bias(self, *args, **kwargs)
        finally:
            del vars(self)["relative_attention_bias"]
            self.relative_attention_bias = embedding

    monkeypatch.setattr(umt5.UMT5Attention, "compute_bias", without_a_call)
    found = cuts_of(meta_model(tiny_config("umt5", initializer_factor=1.5)))  # not the one that is known
    assert any("is read where" in why for why in found.values() if isinstance(why, str))


def test_what_the_models_forward_replaces_is_not_cut():
    """BigBird has another attention for short sequences, and makes it when it is called."""
    reasons = [why for why in cuts_of(meta_model(tiny_config("big_bird"))).values() if isinstance(why, str)]
    assert reasons and all("attention.self" in why and "in the place of" in why for why in reasons)


@pytest.mark.parametrize(("model_type", "why"), [("olmo2", "not apart"), ("codegen", "not apart")])
def test_heads_that_are_not_apart_are_held_whole_and_said_so(model_type, why, caplog):
    config = tiny_config(model_type)
    plan = make_plan(config, SDPConfig(), 2)
    assert {module.kind for module in plan.modules} == {"mlp"}
    reasons = [cut for cut in cuts_of(meta_model(config)).values() if isinstance(cut, str)]
    assert reasons and all(why in reason for reason in reasons)


def test_layers_are_alike_when_all_but_their_place_is_the_same():
    first, second, *_ = meta_model(tiny_config("llama")).model.layers
    assert likeness(first) == likeness(second) and first.self_attn.layer_idx != second.self_attn.layer_idx
    other = copy.deepcopy(second)
    other.self_attn.head_dim *= 2
    assert likeness(other) != likeness(second)
    other = copy.deepcopy(second)
    other.mlp.up_proj = torch.nn.Linear(64, 3, device="meta")
    assert likeness(other) != likeness(second)


def test_what_is_tried_draws_nothing_from_the_random_state_of_the_process():
    """Falcon's linear layers are a class of its own, which is tried as well."""
    _is_linear.cache_clear()
    config = tiny_config("falcon", vocab_size=96)  # of no other test: it is found anew
    model = meta_model(config)
    before = torch.get_rng_state()
    make_plan(model, SDPConfig(), 2)
    assert torch.equal(torch.get_rng_state(), before)
