"""The plan when workers or layers hold different shares, without processes."""

import itertools

import numpy as np
import pytest

from hf_sdp import Plan, SDPConfig, SDPConfigError, Workload, make_plan
from hf_sdp.plan.worker_graph import components
from tests.support.models import tiny_config

UNEQUAL = [0.75, 0.5, 0.5, 0.25]


def config_of(layers: int, **overrides):
    return tiny_config(
        **{
            "num_hidden_layers": layers, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8,
            "head_dim": 8, "intermediate_size": 256, **overrides,
        }
    )  # fmt: skip


def held_share(plan: Plan, module, subnetwork: int) -> float:
    holders = plan.unit_holders[module.name]
    return sum(subnetwork in h for h in holders) / len(holders)


CASES = [
    (UNEQUAL, 8, {}),
    (UNEQUAL, 7, dict(balance="compute", seed=1)),
    ([0.75, 0.25, 0.75, 0.25], 8, {}),
    ([0.75, 0.25, 0.25, 0.25], 7, {}),
    ([1.0, 0.5, 0.5, 0.5], 6, dict(always_held=[0, -1])),
    ([1.0, 0.75, 0.5, 0.5, 0.5, 0.5, 0.375, 0.375], 12, dict(depth_profile="linear")),
    ([0.5] * 8, 8, dict(depth_profile="linear")),
    ([0.25] * 8, 8, dict(depth_profile="linear", always_held=[0])),
    ([0.75] * 8, 5, dict(balance="compute")),
    ([0.5, 0.25, 0.125, 0.125], 16, dict(seed=3)),
]


@pytest.mark.parametrize("level", ["neuron", "block"])
@pytest.mark.parametrize(("coverage", "layers", "options"), CASES, ids=str)
def test_every_uneven_plan_keeps_the_rules(coverage, layers, options, level):
    config = SDPConfig(level=level, coverage=coverage, **options)
    plan = make_plan(config_of(layers), config, len(coverage))
    always = {layer % layers for layer in config.always_held}
    dealt = [m for m in plan.modules if m.layer not in always]
    everyone = tuple(range(len(coverage)))
    for m in plan.modules:
        if m.layer in always:
            assert set(plan.unit_holders[m.name]) == {everyone}
    by_depth = {}
    for kind in ("attention", "mlp"):
        modules = [m for m in dealt if m.kind == kind]
        for w, asked in enumerate(coverage):  # what was asked, within one unit (block level: one block) of each kind
            total = sum(held_share(plan, m, w) for m in modules)
            assert abs(total - asked * len(modules)) <= (1 if level == "block" else 1 / modules[0].num_units) + 1e-9
            assert total > 0
        for m in modules:  # as even as can be: units of one depth differ by at most one holder
            counts = [len(h) for h in plan.unit_holders[m.name]]
            by_depth.setdefault(m.layer, []).extend(counts)
            assert max(counts) - min(counts) <= 1 and min(counts) >= 1
            assert all(list(h) == sorted(set(h)) for h in plan.unit_holders[m.name])
            if level == "neuron":
                assert all(held_share(plan, m, w) > 0 for w in everyone)
    if config.depth_profile == "uniform":
        counts = list(itertools.chain(*by_depth.values()))
        assert max(counts) - min(counts) <= 1
    else:
        depth = [np.mean(by_depth[layer]) for layer in sorted(by_depth)]
        third = round(len(depth) / 3)
        assert np.mean(depth[:third]) > np.mean(depth[third:-third]) > np.mean(depth[-third:])
    if plan.replication[0] >= 2:
        assert len(components(len(coverage), (h for m in dealt for h in plan.unit_holders[m.name]))) == 1
    assert plan.coverage == pytest.approx(np.mean(coverage), abs=0.06)
    assert Plan.from_json(plan.to_json()) == plan


def test_shares_that_are_no_whole_heads_are_rounded_up_and_down_in_turn():
    """5/8 of 4 key/value heads: two in one layer, three in another, whoever it is."""
    config = config_of(8, num_attention_heads=4, num_key_value_heads=4, head_dim=16)
    plan = make_plan(config, SDPConfig(coverage=[1.0, 0.625, 0.625, 0.25]), 4)
    assert [plan.numel(w, "attention") / plan.numel(0, "attention") for w in range(4)] == [1.0, 0.625, 0.625, 0.25]


def test_coverage_and_replication_leave_out_what_is_always_held():
    plan = make_plan(config_of(6), SDPConfig(always_held=[0, -1]), 4)
    assert plan.always_held == (0, 5) and plan.replication == (2, 2) and not plan.is_full
    assert [plan.coverage_of(w) for w in range(4)] == [0.5] * 4
    assert plan.numel(0, "mlp") == 2 * 3 * 64 * 256 + 4 * 3 * 64 * 128


def test_one_coverage_for_all_in_a_list_is_the_same_plan():
    assert make_plan(config_of(6), SDPConfig(coverage=[0.5] * 4), 4) == make_plan(config_of(6), SDPConfig(), 4)


def test_balance_decides_who_gets_what_is_left_over():
    """7 attention and 7 MLP blocks of 4 workers do not divide. By bytes an MLP is worth 3 attentions here, by FLOPs at
    65536 tokens an attention is worth many MLPs; each plan is the more even one in its own measure."""
    long = Workload(batch=1, sequence=65536)
    spread = {}
    for balance, workload in (("memory", None), ("compute", long)):
        options = dict(level="block", coverage=[0.75, 0.5, 0.5, 0.5], balance=balance, workload=workload)
        plan = make_plan(config_of(9), SDPConfig(**options), 4)
        attention, mlp = ([plan.numel(w, kind) for w in range(4)] for kind in ("attention", "mlp"))
        shares = np.array([0.75, 0.5, 0.5, 0.5])
        flops = np.array(attention) / attention[0] * 12 * 64 * 65536  # the quadratic part is nearly all of it
        for measure, held in (("memory", np.array(attention) + mlp), ("compute", flops)):
            spread[balance, measure] = (held / shares).max() / (held / shares).min()
    assert spread["memory", "memory"] <= spread["compute", "memory"]
    assert spread["compute", "compute"] <= spread["memory", "compute"]


def test_neighbouring_blocks_are_trained_together_with_a_depth_profile():
    plan = make_plan(config_of(12), SDPConfig(level="block", depth_profile="linear"), 8)
    blocks = [set(plan.unit_holders[m.name][0]) for m in plan.modules]
    assert all(a & b for a, b in itertools.pairwise(blocks))


@pytest.mark.parametrize(
    "options", [{}, dict(depth_profile="linear"), dict(level="block", depth_profile="linear")], ids=str
)
def test_number_of_uneven_holder_sets_does_not_grow_with_depth(options):
    coverage = 0.5 if options else [0.75, 0.5, 0.5, 0.25] * 2
    sizes = {len(make_plan(config_of(d), SDPConfig(coverage=coverage, **options), 8).holder_sets) for d in (24, 48, 96)}
    assert len(sizes) == 1 and sizes.pop() <= 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(coverage=[0.5, 0.5]), "lists 2 subnetworks.*there are 4"),
        (dict(coverage=[0.25, 0.25, 0.25, 0.125]), "adds up to 0.875.*misses 0.125"),
        (dict(coverage=UNEQUAL, min_replication=3), "adds up to 2 of it.*misses 1 "),
        (dict(coverage=0.5, min_replication=3), "1 less than min_replication=3.*Nearest.*0.75"),
        (dict(coverage=[0.37, 0.5, 0.5, 0.5]), "steps finer than 1/16.*0.375"),
        (dict(coverage=[0.75, 0.5, 0.5, 0.0625]), "8 key/value heads.*Nearest coverage that can be met: 0.125"),
        (dict(always_held=[8]), "8 layers, no layer 8"),
        (dict(always_held=list(range(8))), "nothing is left"),
        (dict(depth_profile="linear", always_held=list(range(7))), "'linear' has no effect on 1 attention"),
    ],
)  # fmt: skip
def test_what_cannot_be_met_is_an_error_that_says_by_how_much(options, message):
    with pytest.raises(SDPConfigError, match=message):
        make_plan(config_of(8), SDPConfig(**options), 4)
