"""The figures of a plan against the same figures computed unit by unit."""

import itertools

import numpy as np
import pytest

from hf_sdp import SDPConfig, make_plan
from hf_sdp.estimate.figures import plan_figures
from hf_sdp.families.meta_model import meta_model
from hf_sdp.plan.holdings import Holdings
from hf_sdp.plan.plan import Plan
from hf_sdp.plan.worker_graph import components, spectral_gap
from tests.support.models import tiny_config
from tests.support.plans import hand_made, units_of

SEQUENCE = 48
MODEL = dict(num_attention_heads=8, num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)


def figures_of(workers: int, subnetworks: int, model: dict | None = None, **options):
    config = SDPConfig(**options)
    full = meta_model(tiny_config(**{**MODEL, **(model or {})}))
    plan = make_plan(full, config, subnetworks)
    return plan, plan_figures(plan, full, config, num_workers=workers, sequence=SEQUENCE, element_bytes=4)


CASES = [
    dict(level="neuron"),
    dict(level="neuron", coverage=0.75, reshard_after_forward=True),
    dict(level="block", coverage=0.25),
    dict(level="block", block_granularity="layer", sharding="none"),
    dict(level="neuron", masking="backward"),
    dict(level="block", masking="backward", reshard_after_forward=True),
    dict(coverage=1.0),
]


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_figures_equal_those_of_a_sum_over_units(options, replicas):
    n = 4
    plan, figures = figures_of(n * replicas, n, **options)
    forward, passes = plan.masking == "forward", 3 if options.get("reshard_after_forward") else 2
    world = passes * (n * replicas - 1) / (n * replicas)
    quadratic = 12 * 32 * SEQUENCE  # heads * head_dim = 32; forward and backward of one layer
    for w in range(n):
        held = {kind: 0 for kind in figures.parameters}
        flops = {kind: 0 for kind in figures.flops}
        sent = 0.0
        for module, _, holders, numel, weights in units_of(plan):
            attention = quadratic // module.num_units if module.kind != "mlp" else 0
            if w in holders:
                held[module.kind] += numel
            if forward:
                flops[module.kind] += (w in holders) * (6 * weights + attention)
                r = len(holders)
                if r == n:
                    sent += world * numel
                elif w in holders and options.get("sharding") == "none":
                    sent += 2 * (r * replicas - 1) / (r * replicas) * numel
                elif w in holders:  # shards of 1/r are reduced among the replicas as well
                    sent += (passes * (r - 1) / r + 2 * (replicas - 1) / replicas / r) * numel
            else:
                flops[module.kind] += 4 * weights + attention + (w in holders) * 2 * weights
                sent += world * numel
        held["shared"] = plan.shared_numel
        flops["shared"] = 6 * 32 * 64  # the head, tied to the embeddings
        sent += world * plan.shared_numel
        one = figures.subnetwork(w)
        assert one["workers"] == [w + n * k for k in range(replicas)]
        assert one["parameters"] == {**held, "total": sum(held.values())} and one["parameters"]["total"] == plan.numel(
            w
        )
        assert one["flops_per_token"] == {**flops, "total": sum(flops.values())}
        assert one["bytes_sent_per_step"] == pytest.approx(4 * sent, rel=1e-12)
        maskable = plan.full_numel - plan.shared_numel
        assert one["coverage"] == pytest.approx((plan.numel(w) - plan.shared_numel) / maskable)
    assert sum(figures.full_parameters.values()) == plan.full_numel
    full = 6 * (sum(weights for *_, weights in units_of(plan)) + 32 * 64) + 4 * quadratic
    assert sum(figures.full_flops.values()) == full
    if plan.coverage == 1:
        assert all(sum(figures.flops.values()) == full)


def test_bytes_and_flops_of_a_known_plan():
    """By hand: coverage 1/2 of 4 subnetworks, one layer of attention and MLP each."""
    plan, figures = figures_of(4, 4, dict(num_hidden_layers=2, attention_bias=False, mlp_bias=False), level="block")
    blocks = 32 + 2 * 32 * 32 + 2 * 32 * 16, 32 + 3 * 32 * 64  # with their norms
    assert figures.full_parameters == {"attention": 2 * blocks[0], "mlp": 2 * blocks[1], "shared": 64 * 32 + 32}
    assert figures.bytes_sent.tolist() == pytest.approx([4 * (sum(blocks) + 2 * 3 / 4 * (64 * 32 + 32))] * 4)
    assert figures.summary()["flops_straggler_ratio"] == 1


def walk(plan: Plan) -> np.ndarray:
    """The walk worker -> unit -> worker, one unit at a time."""
    n, p = plan.num_subnetworks, np.zeros((plan.num_subnetworks,) * 2)
    for _, _, holders, numel, _ in units_of(plan):
        for a, b in itertools.product(holders, holders):
            p[a, b] += numel / len(holders)
    assert p.shape == (n, n)
    return p / p.sum(1, keepdims=True)


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_spectral_gap_is_that_of_the_walk(options):
    plan, figures = figures_of(4, 4, **options)
    eigenvalues = np.sort(np.linalg.eigvals(walk(plan)).real)
    assert eigenvalues[-1] == pytest.approx(1)
    assert figures.spectral_gap == pytest.approx(1 - eigenvalues[-2], abs=1e-9)
    assert figures.spectral_gap == pytest.approx(1 - np.sort(abs(eigenvalues))[-2], abs=1e-9)  # by modulus as well
    assert figures.spectral_gap <= 1 - (1 / plan.coverage - 1) / 3 + 1e-9


@pytest.mark.parametrize(
    ("holders", "num_components", "gap"),
    [
        (((0, 1), (2, 3)), 2, 0.0),
        (((0, 1), (1, 2)), 2, 0.0),  # 3 holds nothing
        (((0, 1, 2, 3), (0, 1, 2, 3)), 1, 1.0),
        (((0, 1), (1, 2), (2, 3), (0, 3)), 1, 0.5),  # a ring of 4 that stays with probability 1/2: 1 - cos²(π/4)
        (((0, 1), (1, 2), (2, 3)), 1, None),
        (((0, 1, 2, 3), (0,), (1,), (2,), (3,)), 1, 0.5),  # more holder sets than workers
    ],
)
def test_components_and_gap_of_plans_made_by_hand(holders, num_components, gap):
    plan = hand_made(4, *holders)
    holdings = Holdings.of(plan)
    numel = np.array([numel for _, _, _, numel, _ in units_of(plan)])
    elements = numel @ holdings.units
    assert len(components(4, holdings.sets_with(elements > 0))) == num_components
    if gap is None:
        gap = 1 - np.sort(np.linalg.eigvals(walk(plan)).real)[-2]
        assert 0 < gap < 0.5
    assert spectral_gap(holdings, elements) == pytest.approx(gap, abs=1e-12)


def test_unequal_holders_show_in_the_spread():
    plan = hand_made(4, (0, 1, 2, 3), (0, 1), (0,))
    full = meta_model(tiny_config(num_hidden_layers=3))
    config = SDPConfig(level="block", block_granularity="layer")
    summary = plan_figures(plan, full, config, num_workers=4, sequence=8, element_bytes=4).summary()
    assert summary["replication"] == {"min": 1, "mean": pytest.approx(7 / 3), "max": 4}
    assert summary["coverage"] == pytest.approx({"min": 1 / 3, "mean": 7 / 12, "max": 1})
    layer = (plan.full_numel - plan.shared_numel) / 3
    held = [3 * layer, 2 * layer, layer, layer]
    mean = sum(held) / 4 + plan.shared_numel
    assert summary["parameters_straggler_ratio"] == pytest.approx((3 * layer + plan.shared_numel) / mean)
    assert summary["num_holder_sets"] == 3


def test_a_thousand_subnetworks_are_as_many_as_eight():
    """The gap comes from holder sets: the same partitions of more workers have the same gap."""
    gaps = []
    for n in (16, 1024):
        family = [tuple(w for w in range(n) if (w * 16 // n >> bit & 1) == half) for bit in range(4) for half in (0, 1)]
        plan = hand_made(n, *family)
        gaps.append(spectral_gap(Holdings.of(plan), np.ones(len(family), dtype=int)))
    assert gaps == pytest.approx([0.75, 0.75])
