"""Learning rates tuned per method: which runs are made, which count, and what is said."""

import json

import pytest

from hf_sdp.bench.quality import Method, Results, TextSetting
from hf_sdp.bench.quality.report import markdown, rows
from hf_sdp.bench.quality.sweep import jobs_at_best, tuned, tuning_jobs
from hf_sdp.cli import main

DENSE, SMALL = Method("data-parallel", None), Method("small", 0.5)
RATES = (0.002, 0.004, 0.008)


def results_of(folder, losses: dict[tuple[Method, int], float]) -> Results:
    results = Results(folder)
    results.expect(TextSetting())
    for (method, seed), loss in losses.items():
        run = {"parameters": 10, "steps": 4, "step_flops": 8.0, "curve": [[2, 5.0], [4, loss]]}
        results.add(method, seed, {**run, "learning_rate": method.learning_rate, "scaled": {"0.8": loss - 0.1}})
    return results


@pytest.fixture
def swept(tmp_path) -> Results:
    """Data parallel is best at the middle rate with the seed that was tuned, small at the edge."""
    losses = {(DENSE.at(rate), 0): loss for rate, loss in zip(RATES, (4.2, 4.0, 4.1), strict=True)}
    losses |= {(SMALL.at(rate), 0): loss for rate, loss in zip(RATES, (4.4, 4.3, float("nan")), strict=True)}
    losses |= {(DENSE.at(0.004), 1): 4.3, (SMALL.at(0.016), 0): 3.9}
    return results_of(tmp_path, losses)


def test_the_middle_rate_of_every_method_comes_first():
    jobs = tuning_jobs([DENSE, SMALL], RATES, 5)
    assert [(m.name, seed) for m, seed in jobs] == [
        *[(f"data-parallel/{RATES[1]}", 5), (f"small@0.5/{RATES[1]}", 5)],
        *[(f"data-parallel/{RATES[0]}", 5), (f"data-parallel/{RATES[2]}", 5)],
        *[(f"small@0.5/{RATES[0]}", 5), (f"small@0.5/{RATES[2]}", 5)],
    ]


def test_one_seed_tunes_and_the_others_run_at_its_best(swept):
    best = tuned(swept.runs)
    assert best["data-parallel"].rate == 0.004 and not best["data-parallel"].is_at_edge
    assert best["small@0.5"].rate == 0.016 and best["small@0.5"].is_at_edge
    assert jobs_at_best(swept, [DENSE, SMALL], [1, 2]) == [
        *[(DENSE.at(0.004), 1), (DENSE.at(0.004), 2), (SMALL.at(0.016), 1), (SMALL.at(0.016), 2)]
    ]


def test_the_table_names_the_rate_and_says_loudly_that_it_is_at_the_edge(swept):
    dense, small = rows(swept)
    assert dense.final == {"0": 4.0, "1": 4.3} and dense.learning_rate == 0.004
    assert small.differences == pytest.approx([-0.1]) and small.best_scale == (0.8, pytest.approx(3.8))
    table = markdown(swept)
    assert "| 0.004 | 0.8: 4.050 |" in table
    assert "AT THE EDGE OF THE SWEEP: small@0.5 (0.016 of 0.002, 0.004, 0.008, 0.016)." in table
    assert "NOT TUNED" not in table
    assert "| final losses by learning rate | 0.002 | 0.004 | 0.008 | 0.016 |" in table
    assert "| data-parallel | 4.200 | 4.000, 4.300 | 4.100 |  |" in table
    assert "| small@0.5 | 4.400 | 4.300 | nan | 3.900 |" in table


def test_a_method_with_one_rate_beside_a_sweep_is_said_to_be_untuned(tmp_path):
    losses = {(DENSE.at(rate), 0): 4 + rate for rate in RATES} | {(SMALL.at(0.004), 0): 3.9}
    assert "LEARNING RATE NOT TUNED: small@0.5." in markdown(results_of(tmp_path, losses))


def test_the_command_tunes_and_goes_on(text, tmp_path):
    sizes = "--hidden 32 --mlp 64 --layers 2 --heads 4 --vocabulary 300 --seq 16 --workers 4 --steps 4 --evaluations 2"
    command = ["simulate", *sizes.split(), "--eval-sequences", "8", "--text", text, "--output", str(tmp_path / "out")]
    main([*command, "--methods", "small@0.5", "--lr-sweep", "0.001,0.002,0.004", "--seeds", "0,1"])
    runs = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert {name: list(seeds) for name, seeds in runs.items()} == {
        **{f"small@0.5/{rate}": ["0"] for rate in (0.001, 0.002, 0.004)},
        tuned(runs)["small@0.5"].name: ["0", "1"],
    }
    with pytest.raises(SystemExit):
        main([*command, "--methods", "small@0.5", "--lr-sweep", "0.001,0.002"])
