"""Schedules, deals and all workers at once: against workers one after the other, and against the model by hand."""

import itertools

import pytest
import torch

from hf_sdp import SDPConfigError, make_plan
from hf_sdp.bench.quality import TextSetting, parse_methods, phases, train_on_text
from hf_sdp.bench.quality.overshoot import branches, scaled
from hf_sdp.bench.quality.phases import ChangesPlan, redealt
from hf_sdp.bench.quality.training import course_of
from hf_sdp.model.stacked import is_stacked

SETTING = TextSetting(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=300, sequence=16, batch=1, workers=4, steps=8, evaluations=2, eval_sequences=8,
)  # fmt: skip


def parsed(name: str):
    (method,) = parse_methods([name], ())
    return method


@pytest.mark.parametrize(
    "name",
    [
        "forward-neuron-linear@0.5",
        "forward-block@0.5",
        "backward-neuron@0.5",
        "forward-neuron-linear@0.5+1:0.4",
        "forward-neuron@0.5+backward:0.6+block:0.3",
    ],
)
def test_all_workers_at_once_train_as_one_after_the_other(name, text, tmp_path, monkeypatch):
    """The engine's own simulation follows the schedule there."""
    at_once = train_on_text(parsed(name), 0, SETTING, text, str(tmp_path))
    monkeypatch.setattr(phases, "can_be_stacked", lambda model, plan: False)
    one_by_one = train_on_text(parsed(name), 0, SETTING, text, str(tmp_path))
    for key in ("steps", "step_flops", "parameters"):
        assert at_once[key] == pytest.approx(one_by_one[key], rel=1e-6), key
    curves = [[loss for _, loss in run["curve"]] for run in (at_once, one_by_one)]
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    assert at_once["scaled"] == pytest.approx(one_by_one["scaled"], abs=1e-4)
    assert at_once.get("phases") == one_by_one.get("phases")


def test_phases_have_their_shares_of_the_flops_and_all_cost_what_data_parallel_costs():
    course = course_of(parsed("forward-neuron@0.25+0.5:0.6+1:0.2"), SETTING, 0)
    steps = 10_000
    firsts = course.first_steps(steps)
    lengths = [end - first for first, end in zip(firsts, [*firsts[1:], steps], strict=True)]
    flops = [length * cost for length, cost in zip(lengths, course.costs, strict=True)]
    assert [f / sum(flops) for f in flops] == pytest.approx([0.4, 0.4, 0.2], abs=1e-3)
    assert sum(flops) == pytest.approx(course.mean_cost * steps, rel=1e-3)
    assert [plan.coverage for plan in course.plans] == [0.25, 0.5, 1.0]
    (dense,) = course_of(parsed("forward-neuron@0.5+1:0.4"), SETTING, 0).costs[1:]
    assert course.costs[2] == dense > course.costs[1] > course.costs[0]


def test_a_boundary_is_before_its_step():
    course = course_of(parsed("forward-neuron@0.5+1:0.4"), SETTING, 0)
    model, callback = course.prepared(SETTING, 20)
    (boundary,) = course.first_steps(20)[1:]
    seen = []
    for step in range(20):
        callback.on_step_begin(None, type("State", (), {"global_step": step}), None, model=model)
        seen.append(is_stacked(model))
    assert seen == [True] * boundary + [False] * (20 - boundary)


class TestRedealt:
    plan = make_plan(SETTING.model_config(), parsed("forward-neuron@0.5").config(0), 4)

    @pytest.mark.parametrize("order", ["random", "rolling"])
    def test_units_change_and_every_worker_holds_as_many(self, order):
        deals = [redealt(self.plan, order, number, 0) for number in range(4)]
        assert deals[0] == self.plan
        assert any(a.set_of_unit != b.set_of_unit for a, b in itertools.pairwise(deals))
        for deal in deals:
            assert [deal.numel(k) for k in range(4)] == [self.plan.numel(k) for k in range(4)]

    def test_rolling_moves_each_unit_by_one(self):
        for name, sets in redealt(self.plan, "rolling", 1, 0).set_of_unit.items():
            assert sets[1:] + sets[:1] == self.plan.set_of_unit[name]

    def test_it_happens_every_k_steps(self):
        method = parsed("forward-neuron@0.5~random3")
        model = method.dense(SETTING, 0)
        callback = ChangesPlan({0: self.plan}, method.redeal, 0)
        held = []
        for step in range(7):
            callback.on_step_begin(None, type("State", (), {"global_step": step}), None, model=model)
            held.append(torch.cat([m.index.flatten() for m in model.modules() if hasattr(m, "index")]).tolist())
        assert held[0] == held[2] != held[3] == held[5] != held[6]

    @pytest.mark.parametrize("name", ["forward-block@0.5~random3", "forward-neuron@0.5~random3+block:0.5"])
    def test_a_block_cannot_be_dealt_anew(self, name):
        with pytest.raises(SDPConfigError, match="dealt anew at neuron level"):
            course_of(parsed(name), SETTING, 0)


def test_scaled_branches_are_scaled_weights():
    """A branch is linear in its last layer."""
    ids = torch.arange(16).reshape(1, 16)
    model = parsed("data-parallel").build(SETTING, 0).eval()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with scaled(model, branches(model), 0.5):
            halved = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, plain)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 0.5
            layer.mlp.down_proj.weight *= 0.5
        torch.testing.assert_close(halved, model(input_ids=ids).logits)
    assert not torch.allclose(halved, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("small@0.5+1:0.4", "only SDP has phases"),
        ("forward-neuron@0.5+1", "'' is no number"),
        ("forward-neuron@0.5+1:1.5", "must be between 0 and 1"),
        ("forward-neuron@0.5+0.75:0.2+1:0.4", "less than that of the phase before"),
        ("forward-neuron@0.5+sideways:0.2", "'sideways' is no number"),
        ("forward-neuron@0.5+2:0.2", "must be in \\(0, 1\\]"),
        ("forward-neuron@0.5~often", "must be one of random, rolling"),
        ("forward-neuron@0.5~random0", "must be one of random, rolling"),
        ("forward-neuron@0.5/0", "must be positive"),
    ],
)
def test_bad_names(name, said):
    with pytest.raises(SDPConfigError, match=said):
        parsed(name)


def test_a_name_is_that_of_what_it_is_parsed_to():
    for name in ("data-parallel/0.004", "forward-neuron-linear@0.5~rolling50+0.75:0.6+1:0.2/0.008", "small@0.25"):
        assert parsed(name).name == name
