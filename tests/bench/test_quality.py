"""The quality comparison: what the baselines do, equal FLOPs, results that are kept, bad input."""

import json
import statistics

import pytest
import torch

from hf_sdp import SDPConfig, SDPConfigError, make_plan
from hf_sdp.bench.quality import (
    FAMILIES,
    Method,
    Results,
    TextSetting,
    number_of_steps,
    parse_methods,
    step_flops,
    train_on_text,
)
from hf_sdp.bench.quality import results as results_module
from hf_sdp.bench.quality.baselines import narrowed, survival_probabilities
from hf_sdp.bench.quality.report import markdown, rows, write_report
from hf_sdp.cli import main

TINY = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
    vocab_size=300, sequence=16, batch=1, workers=4, steps=8, evaluations=2, eval_sequences=8,
)  # fmt: skip
TINY_OPTIONS = (
    "--hidden 32 --mlp 64 --layers 4 --heads 4 --vocabulary 300 --seq 16 --batch 1 --workers 4 --steps 8 "
    "--evaluations 2 --eval-sequences 8 --seeds 0"
).split()
IDS = torch.arange(16).reshape(1, 16)


def build(method: str, seed: int = 0, **changes) -> torch.nn.Module:
    (parsed,) = parse_methods([method], ())
    return parsed.build(TextSetting(**{**TINY, **changes}), seed)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def refused(capsys, *arguments: str) -> str:
    """The one line with which the command refuses its input."""
    with pytest.raises(SystemExit) as exit:
        main(["simulate", *arguments])
    assert exit.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("hf-sdp: ")
    return line


class TestMethods:
    def test_a_family_is_taken_at_every_coverage_and_a_name_with_its_own(self):
        found = parse_methods(["data-parallel", "forward-block", "small@0.25", "forward-block@0.5"], (0.25, 0.5))
        assert [m.name for m in found] == ["data-parallel", "forward-block@0.25", "forward-block@0.5", "small@0.25"]

    @pytest.mark.parametrize("family", FAMILIES)
    def test_every_family_builds_a_model_that_learns_and_evaluates(self, family):
        model = build(family if family == "data-parallel" else f"{family}@0.75").train()
        for _ in range(4):
            model(input_ids=IDS, labels=IDS).loss.backward()
        assert model.lm_head.weight.grad.abs().sum() > 0
        assert torch.isfinite(logits(model.eval())).all()

    def test_all_methods_of_a_seed_start_from_the_same_weights(self):
        reference = build("data-parallel").state_dict()
        for family in set(FAMILIES) - {"data-parallel", "small"}:
            for name, value in build(f"{family}@0.75").state_dict().items():
                assert torch.equal(value, reference[name]), (family, name)


class TestDropout:
    def test_drops_neurons_in_training_alone(self):
        dense, model = build("data-parallel").eval(), build("dropout@0.75")
        torch.testing.assert_close(logits(model.eval()), logits(dense), rtol=0, atol=0)
        seen = []
        model.train().model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
        for _ in range(20):
            logits(model)
        share = (torch.stack(seen) == 0).float().mean().item()
        assert share == pytest.approx(0.25, abs=0.02)


class TestStochasticDepth:
    def test_evaluation_scales_each_block_by_its_survival(self):
        """A branch is linear in its last layer: the scaled model is the dense one with scaled weights there."""
        dense, model = build("data-parallel").eval(), build("stochastic-depth-linear@0.75").eval()
        probabilities = survival_probabilities(0.75, 8, linear=True)
        with torch.no_grad():
            for index, layer in enumerate(dense.model.layers):
                layer.self_attn.o_proj.weight *= probabilities[2 * index]
                layer.mlp.down_proj.weight *= probabilities[2 * index + 1]
        torch.testing.assert_close(logits(model), logits(dense))

    def test_in_training_blocks_are_absent_at_random_and_not_scaled(self):
        model = build("stochastic-depth@0.5").train()
        modules = [m for layer in model.model.layers for m in (layer.self_attn, layer.mlp)]
        for m in modules:
            m.survival = 0.0
        embedded = model.model.embed_tokens(IDS)
        torch.testing.assert_close(logits(model), model.lm_head(model.model.norm(embedded)).detach())
        for m in modules:
            m.survival = 1.0
        torch.testing.assert_close(logits(model), logits(build("data-parallel").train()))

    def test_blocks_survive_as_often_as_they_should_and_the_seed_decides_which(self):
        def survivors(seed: int) -> list[bool]:
            model, seen = build("stochastic-depth@0.75", seed).train(), []
            down = model.model.layers[2].mlp.down_proj
            for _ in range(200):
                calls = []
                handle = down.register_forward_hook(lambda *_, calls=calls: calls.append(1))
                logits(model)
                handle.remove()
                seen.append(bool(calls))
            return seen

        first = survivors(0)
        assert statistics.mean(first) == pytest.approx(0.75, abs=0.1)
        assert first == survivors(0) != survivors(1)

    def test_linear_survival_falls_and_has_the_mean_asked_for(self):
        probabilities = survival_probabilities(0.75, 16, linear=True)
        steps = [a - b for a, b in zip(probabilities, probabilities[1:], strict=False)]
        assert statistics.mean(probabilities) == pytest.approx(0.75)
        assert min(steps) == pytest.approx(max(steps)) and 0 < probabilities[-1] < probabilities[0] < 1
        with pytest.raises(SDPConfigError, match="at least 0.469"):
            survival_probabilities(0.25, 16, linear=True)


class TestSmallModel:
    @pytest.mark.parametrize("coverage", [0.25, 0.5, 0.75])
    def test_has_the_parameters_of_a_subnetwork(self, coverage):
        config = TextSetting().model_config()
        subnetwork = make_plan(config, SDPConfig(coverage=coverage), 8).numel(0)
        small = sum(p.numel() for p in Method("small", coverage).build(TextSetting(), 0).parameters())
        assert small == pytest.approx(subnetwork, rel=0.01)

    def test_stays_as_deep_and_gets_narrower_everywhere(self):
        full = TextSetting().model_config()
        small = narrowed(full, 0.5, 8)
        assert small.num_hidden_layers == full.num_hidden_layers
        assert small.hidden_size < full.hidden_size and small.intermediate_size < full.intermediate_size


class TestEqualFlops:
    def test_steps_cost_what_data_parallel_costs(self):
        setting = TextSetting(**{**TINY, "steps": 200})
        budget = 200 * step_flops(build("data-parallel"), setting)
        for name in ("forward-neuron@0.25", "backward-block@0.5", "stochastic-depth@0.5", "small@0.5", "dropout@0.5"):
            (method,) = parse_methods([name], ())
            flops = step_flops(method.build(setting, 0), setting)
            steps = number_of_steps(method, setting, flops, 0)
            assert abs(steps * flops - budget) <= flops, name  # half of the two evaluations' grid
            assert steps % 2 == 0 and (steps > 200 or name == "dropout@0.5")

    def test_stochastic_depth_costs_on_average_what_block_level_costs(self):
        setting = TextSetting(**TINY)
        assert step_flops(build("stochastic-depth@0.5"), setting) == step_flops(build("forward-block@0.5"), setting)

    def test_equal_steps(self):
        setting = TextSetting(**TINY, equal="steps")
        assert number_of_steps(Method("forward-block", 0.5), setting, 1.0, 0) == TINY["steps"]


class TestTraining:
    def test_data_parallel_is_sdp_at_full_coverage(self, text, tmp_path):
        """One large micro-batch against one for each worker: the same data, order and gradient."""
        setting = TextSetting(**TINY, equal="steps")
        runs = [
            train_on_text(m, 0, setting, text, str(tmp_path))
            for m in (Method("data-parallel", None), Method("forward-block", 1.0))
        ]
        dense, full = ([loss for _, loss in run["curve"]] for run in runs)
        assert dense == pytest.approx(full, abs=1e-4)
        assert [step for step, _ in runs[0]["curve"]] == [4, 8] and dense[1] < dense[0]

    def test_runs_are_kept_and_not_repeated(self, text, tmp_path, capsys):
        output = tmp_path / "out"
        arguments = ["simulate", *TINY_OPTIONS, "--text", text, "--output", str(output)]
        main([*arguments, "--methods", "data-parallel,forward-block@0.5", "--note", "first"])
        stored = json.loads((output / "results.json").read_text())["runs"]
        assert [runs["0"]["note"] for runs in stored.values()] == ["first", "first"]
        for name in ("table.md", "curves.png", "final.png"):
            assert (output / name).stat().st_size > 0

        more = "data-parallel,forward-block@0.5,small@0.5"
        main([*arguments, "--methods", more, "--note", "second", "--processes", "2"])
        runs = json.loads((output / "results.json").read_text())["runs"]
        assert {method: runs[method] for method in stored} == stored  # time and note included
        assert runs["small@0.5"]["0"]["note"] == "second"
        line = refused(capsys, *arguments[1:], "--lr", "1e-3")
        assert "learning_rate=0.004 there, 0.001 asked" in line


def test_the_first_seed_of_every_method_comes_first():
    a, b = Method("data-parallel", None), Method("small", 0.5)
    assert results_module.jobs_in_order([a, b], [3, 4, 5]) == [(a, 3), (b, 3), (a, 4), (a, 5), (b, 4), (b, 5)]


def test_the_table_has_mean_and_spread_over_seeds(tmp_path):
    results = Results(tmp_path)
    results.expect(TextSetting())
    for method, losses in {Method("data-parallel", None): (4.0, 4.2), Method("small", 0.5): (4.3, 4.4)}.items():
        for seed, loss in enumerate(losses):
            run = {"parameters": 10, "steps": 4, "step_flops": 8.0, "curve": [[2, 5.0], [4, loss]]}
            results.add(method, seed, run)
    dense, small = rows(Results(tmp_path))
    assert dense.differences == [0, 0] and small.mean == pytest.approx(4.35)
    assert small.differences == pytest.approx([0.3, 0.2])
    assert "| 4.350 ± 0.071 | 4.300 to 4.400 | +0.250 ± 0.071 |" in markdown(results)
    assert all(path.exists() for path in write_report(results))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--methods", "forward-nothing"], "Unknown method 'forward-nothing'"),
        (["--methods", "data-parallel@0.5"], "no coverage"),
        (["--methods", "forward-block@x"], "'x' is no number"),
        (["--methods", "forward-block@1.5"], "must be between 0 and 1"),
        (["--methods", "forward-block@0.3"], "Nearest coverage that can be met: 0.25"),
        (["--methods", "stochastic-depth-linear@0.25"], "at least"),
        (["--steps", "-8"], "--steps': -8 is not in the range"),
        (["--steps", "7"], "must be a multiple of evaluations=2: the last evaluation is at the end. Nearest: 8"),
        (["--lr", "0"], "--lr': 0.0 is not in the range"),
        (["--hidden", "36"], "multiple of twice"),
        (["--seeds", "0,-1"], "--seeds"),
        (["--seeds", "a"], "no list of numbers"),
        (["--text", "/no/such/file"], "does not exist"),
        (["--report"], "no runs to report"),
    ],
)
def test_bad_input_is_one_line(arguments, said, tmp_path, capsys):
    assert said in refused(capsys, *TINY_OPTIONS, "--output", str(tmp_path / "out"), *arguments)
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_short_and_a_broken_results_file_are_one_line(tmp_path, capsys):
    short = tmp_path / "short.txt"
    short.write_text("too short\n" * 20)
    arguments = [*TINY_OPTIONS, "--methods", "data-parallel", "--output", str(tmp_path)]
    assert "too short" in refused(capsys, *arguments, "--text", str(short))
    (tmp_path / "results.json").write_text("{}")
    assert "no results file" in refused(capsys, *arguments, "--report")
