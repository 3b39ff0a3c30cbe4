"""The plan, without processes."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import MambaConfig

from hf_sdp import Plan, SDPConfig, SDPConfigError, make_plan
from hf_sdp.bench.support.tiny import tiny_config as support_config
from hf_sdp.plan.even import MAX_HOLDER_SETS, reduced
from hf_sdp.plan.worker_graph import components
from tests.support.models import tiny_config, tiny_model

SHAPES = {  # key/value heads, layers, neurons -> how many of the settings below can be met
    (2, 4, 96): 92, (4, 1, 128): 64, (5, 3, 100): 102, (8, 8, 1376): 118, (3, 7, 129): 104,
}  # fmt: skip
SETTINGS = [  # level, seed, replication r, subnetworks n
    (level, seed, r, n)
    for n in (2, 3, 4, 6, 16)
    for r in range(1, n + 1)
    for level in ("neuron", "block")
    for seed in (0, 1)
]
DISCONNECTED = {(4, 5, 16), (8, 3, 16), (7, 3, 16)}
"""Layers, r and n at block level, where the blocks are too few for the holder sets to connect all workers."""


def reason_against(kv_heads: int, layers: int, level: str, r: int, n: int) -> str | None:
    """What is said of a setting that cannot be met.

    At coverage r/n every worker needs at least one unit of each kind: of each module at neuron level, of all layers at
    block level. Where units are held by several workers, all workers must be connected by units that they share."""
    if (kv_heads if level == "neuron" else layers) * r < n:
        return "is less than one unit per worker"
    if level == "block" and (layers, r, n) in DISCONNECTED:
        return "too few to connect"
    return None


def config_of_shape(kv_heads: int, layers: int, neurons: int):
    return tiny_config(
        hidden_size=16 * kv_heads, num_attention_heads=2 * kv_heads, num_key_value_heads=kv_heads, head_dim=8,
        num_hidden_layers=layers, intermediate_size=neurons, attention_bias=True, mlp_bias=True,
    )  # fmt: skip


def plans(kv_heads: int, layers: int, neurons: int):
    """``(plan, r, n)`` of every setting that can be met; the others are errors."""
    config = config_of_shape(kv_heads, layers, neurons)
    for level, seed, r, n in SETTINGS:
        sdp = SDPConfig(level=level, coverage=r / n, seed=seed)
        if reason := reason_against(kv_heads, layers, level, r, n):
            with pytest.raises(SDPConfigError, match=reason):
                make_plan(config, sdp, n)
        else:
            yield make_plan(config, sdp, n), r, n


LARGE = list(SHAPES)[3:]  # many seconds each


@pytest.mark.parametrize("shape", [pytest.param(s, marks=pytest.mark.long if s in LARGE else ()) for s in SHAPES])
def test_every_plan_keeps_the_rules(shape):
    num_plans = 0
    for plan, r, n in plans(*shape):
        num_plans += 1
        for name, slices in plan.slices.items():  # tile the parameter, r holders each, all for shared ones
            assert [s.start for s in slices] == [0, *(s.stop for s in slices[:-1])]
            assert slices[-1].stop == plan.shapes[name][slices[0].dim]
            for s in slices:
                assert len(set(s.holders)) == (n if s.unit is None else r) and list(s.holders) == sorted(s.holders)
        units = {}  # all slices of a unit have its holders
        for slices in plan.slices.values():
            for s in slices:
                assert units.setdefault(s.unit, s.holders) == s.holders
        for kind in ("attention", "mlp"):  # balance: within one unit, in elements
            held = [plan.numel(subnetwork, kind) for subnetwork in range(n)]
            unit = max(
                sum(math.prod(plan.shapes[p]) // m.num_units for p in m.dims) for m in plan.modules if m.kind == kind
            )
            assert max(held) - min(held) <= unit
            assert min(held) > 0
        assert len(plan.holder_sets) <= max(MAX_HOLDER_SETS, 2 * reduced(r, n)[1] + 1)
        if r >= 2:
            assert len(components(n, (h for hs in plan.unit_holders.values() for h in hs))) == 1
        if plan.level == "neuron":  # something of every module, so that no layer is empty for anybody
            assert all({p.module.name for p in plan.held_parts(s)} == {m.name for m in plan.modules} for s in range(n))
        assert plan.coverage == pytest.approx(r / n) and plan.replication == (r, r)
        maskable = [plan.numel(s) - plan.shared_numel for s in range(n)]
        assert sum(maskable) == r * (plan.full_numel - plan.shared_numel)
        assert Plan.from_json(plan.to_json()) == plan
        assert Plan.from_json(plan.to_json()).hash == plan.hash
    assert num_plans == SHAPES[shape]


def test_block_level_trains_neighbouring_blocks_together():
    """The full model is evaluated with all blocks: the two of a layer, and those of neighbouring layers, must be held
    together by some worker. (Dealt to complementary halves, they never meet in training.)"""
    plan = make_plan(tiny_config(num_hidden_layers=12), SDPConfig(level="block"), 8)
    blocks = [set(plan.unit_holders[m.name][0]) for m in plan.modules]
    for distance in (1, 2):
        assert all(a & b for a, b in zip(blocks, blocks[distance:], strict=False)), distance


def test_any_two_workers_meet():
    """At coverage 1/2 of 8 subnetworks every pair shares units, not only a chain of them."""
    plan = make_plan(tiny_config(num_hidden_layers=8), SDPConfig(), 8)
    pairs = {(a, b) for holders in plan.unit_holders.values() for h in holders for a in h for b in h if a < b}
    assert len(pairs) == 28


def test_number_of_holder_sets_does_not_grow_with_depth():
    sizes = {len(make_plan(tiny_config(num_hidden_layers=d), SDPConfig(), 8).holder_sets) for d in (8, 16, 64)}
    assert sizes == {9}


def test_config_and_model_give_the_same_plan():
    for options in (
        {},
        {"tie_word_embeddings": True},
        {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    ):
        config = SDPConfig()
        assert make_plan(tiny_config(**options), config, 4) == make_plan(tiny_model(**options), config, 4)


def test_shared_and_cut_parameters():
    plan = make_plan(tiny_config(attention_bias=True, mlp_bias=True, tie_word_embeddings=True), SDPConfig(), 4)
    assert "lm_head.weight" not in plan.slices  # tied: once
    shared = {name for name, slices in plan.slices.items() if slices[0].unit is None}
    layer = {n.removeprefix("model.layers.0.") for n in shared if n.startswith("model.layers.0.")}
    assert layer == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.o_proj.bias",
        "mlp.down_proj.bias",
    }
    dims = {
        n.removeprefix("model.layers.0."): s[0].dim
        for n, s in plan.slices.items()
        if "layers.0" in n and n not in shared
    }
    assert {n for n, dim in dims.items() if dim == 1} == {"self_attn.o_proj.weight", "mlp.down_proj.weight"}
    block = make_plan(tiny_config(attention_bias=True), SDPConfig(level="block"), 4)
    assert {n for n, s in block.slices.items() if s[0].unit is None} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }
    units = {n: s[0].unit for n, s in block.slices.items()}
    assert units["model.layers.1.input_layernorm.weight"] == units["model.layers.1.self_attn.q_proj.bias"]
    assert units["model.layers.1.input_layernorm.weight"] != units["model.layers.1.mlp.up_proj.weight"]


def test_whole_layers():
    plan = make_plan(tiny_config(num_hidden_layers=8), SDPConfig(level="block", block_granularity="layer"), 4)
    assert {m.kind for m in plan.modules} == {"layer"}
    assert [len(plan.held_parts(s)) for s in range(4)] == [4] * 4


def test_query_heads_follow_their_key_value_head():
    plan = make_plan(tiny_config(num_attention_heads=8, num_key_value_heads=2), SDPConfig(), 4)
    for k, q in (("k_proj", "q_proj"), ("v_proj", "o_proj")):
        first, second = (plan.slices[f"model.layers.0.self_attn.{n}.weight"] for n in (k, q))
        assert [s.holders for s in first] == [s.holders for s in second]
        assert [s.stop - s.start for s in first] == [4, 4] and [s.stop - s.start for s in second] == [16, 16]


def test_seeds_deal_other_plans_of_the_same_balance():
    base, other = (make_plan(tiny_config(num_hidden_layers=8), SDPConfig(level="block", seed=s), 8) for s in (0, 1))
    assert base.hash != other.hash
    assert [base.numel(s) for s in range(8)] == [other.numel(s) for s in range(8)]


@pytest.mark.long
def test_the_hash_is_the_same_in_every_process():
    code = (
        "from tests.support.models import tiny_config; from hf_sdp import *; "
        "print(make_plan(tiny_config(), SDPConfig(seed=3), 4).hash)"
    )
    hashes = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, cwd=Path(__file__).parents[2],
            capture_output=True, text=True, check=True, timeout=120,
        ).stdout.split()[-1]
        for seed in ("1",)  # this process has another
    }  # fmt: skip
    assert hashes == {make_plan(tiny_config(), SDPConfig(seed=3), 4).hash}


@pytest.mark.parametrize(
    ("options", "num_subnetworks", "message"),
    [
        (dict(coverage=0.3), 4, "Nearest coverage that can be met: 0.25"),
        (dict(coverage=0.5), 3, "Nearest coverage that can be met: 0.666667"),
        (dict(coverage=0.125), 8, "4 key/value heads.*Nearest coverage that can be met: 0.25"),
        (dict(coverage=0.125, level="block"), 8, "4 attention units.*Nearest coverage that can be met: 0.25"),
        (dict(coverage=0.25, level="block", block_granularity="layer"), 8, "share no unit"),
    ],
)
def test_what_cannot_be_met_is_an_error_with_the_nearest_that_can(options, num_subnetworks, message):
    with pytest.raises(SDPConfigError, match=message):
        make_plan(tiny_config(), SDPConfig(**options), num_subnetworks)


def test_nothing_matched_names_what_works():
    mamba = MambaConfig(num_hidden_layers=4, hidden_size=16, state_size=4, vocab_size=8)
    with pytest.raises(SDPConfigError, match=r"Nothing in MambaForCausalLM .*level='neuron'.* Use level='block'\."):
        make_plan(mamba, SDPConfig(), 2)
    assert make_plan(mamba, SDPConfig(level="block"), 2).coverage == 0.5


def test_a_kind_of_few_layers_is_dealt_with_what_does_the_same_work():
    """DeepSeek's first layers have an MLP where the others have experts."""
    plan = make_plan(support_config("deepseek_v3"), SDPConfig(level="block", coverage=0.25), 4)
    kinds = [module.kind for module in plan.modules]
    assert (kinds.count("attention"), kinds.count("mlp"), kinds.count("experts")) == (4, 2, 2)
    for subnetwork in range(4):
        held = [part.module.kind for part in plan.held_parts(subnetwork)]
        assert held.count("attention") == held.count("mlp") + held.count("experts") == 1
