"""The quality comparison on images: one short run of it, its data and its report."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from hf_sdp.bench.quality import Method, Results
from hf_sdp.bench.quality.baselines import numel_of, numel_of_a_subnetwork

SCRIPTS = Path(__file__).parents[2] / "examples" / "benchmarks"
TINY = dict(widths=(8, 16), depths=(3, 3), workers=2, batch=4, steps=4, evaluations=2, recalibrate_rows=32)
BLOCK = Method("forward-block", 0.5)


@pytest.fixture
def script(monkeypatch):
    """``image_quality`` with 40 images that are no digits."""
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("image_quality")
    images = torch.rand(40, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 10
    data = [script.Digits(images, labels, fixed=fixed) for fixed in (False, True)]
    monkeypatch.setattr(script, "digits", lambda: data)
    return script


def test_a_second_evaluation_with_other_statistics_changes_nothing(script, monkeypatch):
    setting = script.ImageSetting(**TINY)
    run = script.train_on_digits(BLOCK, 0, setting)
    monkeypatch.setattr(script.TwiceEvaluated, "evaluate", Trainer.evaluate)
    plain = script.train_on_digits(BLOCK, 0, setting)
    for curve in ("curve", script.ACCURACY):
        assert run[curve] == plain[curve] and [step for step, _ in run[curve]] == [run["steps"] // 2, run["steps"]]
    assert plain[script.RECALIBRATED_LOSS] == []
    for (_, loss), (_, recalibrated) in zip(run["curve"], run[script.RECALIBRATED_LOSS], strict=True):
        assert abs(loss - recalibrated) > 1e-4


def test_the_report_has_a_row_for_each_method(script, tmp_path):
    setting = script.ImageSetting(**TINY)
    for _ in range(2):  # what is read back is of the same setting
        results = Results(tmp_path)
        results.expect(setting)
        for method in (Method("data-parallel", None), BLOCK):
            if not results.has(method, 0):
                results.add(method, 0, script.train_on_digits(method, 0, setting))
    _, _, dense, block = script.write_report(results).splitlines()
    stored = json.loads(results.path.read_text())["runs"]
    recalibrated = stored[BLOCK.name]["0"][script.RECALIBRATED_LOSS][-1][1]
    assert f"| {recalibrated:.3f} |" in block
    assert f"| {recalibrated - stored['data-parallel']['0']['curve'][-1][1]:+.3f} |" in block
    assert dense.count("| - ") == 4  # neither recalibrated nor compared with itself
    assert all((tmp_path / name).stat().st_size for name in ("table.md", "final.png"))


def test_the_small_model_has_the_parameters_of_a_subnetwork(script):
    setting = script.ImageSetting()
    wanted = numel_of_a_subnetwork(setting.model_config(), 0.5, setting.workers)
    small = setting.narrowed(0.5)
    assert numel_of(small) == pytest.approx(wanted, rel=0.1)
    assert small.depths == setting.model_config().depths


def test_images_to_test_are_corrupted_once_and_those_to_train_anew(script):
    train, test = script.digits()
    before = torch.get_rng_state()
    again = script.Digits(test.images, test.labels, fixed=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(again[3]["pixel_values"], test[3]["pixel_values"])
    assert not torch.equal(train[3]["pixel_values"], train[3]["pixel_values"])
