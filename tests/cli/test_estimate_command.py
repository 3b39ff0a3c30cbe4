"""``hf-sdp estimate``: what it prints, and what it refuses."""

import contextlib
import json
import resource

import pytest

from hf_sdp.cli import main
from tests.support.models import SMALL, tiny_config


def run(capsys, *arguments) -> str:
    """What ``hf-sdp estimate`` prints when all is well."""
    with contextlib.suppress(SystemExit):
        main(["estimate", *map(str, arguments)])
    printed = capsys.readouterr()
    assert printed.out, printed.err
    return printed.out


def test_command_as_table_and_json(capsys, tmp_path):
    tiny_config(**SMALL, num_key_value_heads=4).save_pretrained(tmp_path)
    arguments = ["--workers", "4", "--level", "block", "--batch", "2", "--seq", "64"]
    assert "SDP, sharding none" in run(capsys, tmp_path, *arguments)
    arguments += ["--bandwidth", "1Gbit", "--flops", "1TFLOPS", "--json"]
    engines = {e["engine"]: e for e in json.loads(run(capsys, tmp_path, *arguments))["engines"]}
    assert len(engines) == 9
    ddp, full, none = (engines[name] for name in ("DDP", "SDP", "SDP, sharding none"))
    assert full["peak_bytes"]["max"] < none["peak_bytes"]["max"] < ddp["peak_bytes"]["max"]
    assert ddp["step_time_s"]["total"] == pytest.approx(ddp["step_time_s"]["compute"] + ddp["step_time_s"]["exposed"])
    between = (full["peak_bytes"]["max"] + none["peak_bytes"]["max"]) / 2
    report = json.loads(run(capsys, tmp_path, *arguments, "--gib", between / 2**30))
    assert [e["fits"] for e in report["engines"] if e["engine"].startswith("SDP")] == [True, True, False]
    largest = report["largest_coverage_that_fits"]
    assert largest["SDP, sharding none"] == 0.25 and largest["SDP"] >= 0.5


def peaks_of_sdp(report: str) -> dict[str, int]:
    return {e["engine"]: e["peak_bytes"]["max"] for e in json.loads(report)["engines"] if e["engine"].startswith("SDP")}


def test_each_phase_of_a_schedule_is_estimated(capsys, tmp_path):
    tiny_config(**SMALL, num_key_value_heads=4).save_pretrained(tmp_path)
    arguments = [tmp_path, "--workers", "4", "--batch", "2", "--seq", "64", "--dtype", "fp32", "--json"]
    schedule = ["--coverage-schedule", "0:0.5,0.6:1:gradient_checkpointing=true"]
    found = peaks_of_sdp(run(capsys, *arguments, *schedule))
    half = peaks_of_sdp(run(capsys, *arguments, "--coverage", "0.5"))
    whole = peaks_of_sdp(run(capsys, *arguments, "--coverage", "1", "--gradient-checkpointing"))
    assert found == {f"{name}, from 0": n for name, n in half.items()} | {f"{n}, from 0.6": whole[n] for n in whole}
    for enough in (False, True):
        limit = max(half["SDP"], whole["SDP"]) / 2**30 * (1.01 if enough else 0.99)
        memory = ["--memory-gib", ",".join([str(limit)] * 4)]
        with contextlib.suppress(SystemExit):
            main(["estimate", *map(str, arguments), *schedule, *memory])
        printed = capsys.readouterr()
        assert bool(printed.out) == enough and ("is too little for the phase" in printed.err) != enough


def test_a_schedule_of_one_phase_is_estimated_with_its_options(capsys, tmp_path):
    tiny_config(**SMALL, num_key_value_heads=4).save_pretrained(tmp_path)
    arguments = [tmp_path, "--workers", "4", "--batch", "2", "--seq", "64", "--gib", "1", "--json"]
    found = run(capsys, *arguments, "--coverage-schedule", "0:0.5:gradient_checkpointing=true")
    same = run(capsys, *arguments, "--coverage", "0.5", "--gradient-checkpointing")
    assert peaks_of_sdp(found) == peaks_of_sdp(same)
    of_shardings = json.loads(found)["largest_coverage_that_fits"]
    assert of_shardings == json.loads(same)["largest_coverage_that_fits"] and set(of_shardings.values()) == {1.0}


def test_the_largest_coverage_is_also_found_of_a_depth_profile_which_ends_at_1(capsys, tmp_path):
    tiny_config(**SMALL, num_key_value_heads=4).save_pretrained(tmp_path)
    arguments = ["--workers", "4", "--depth-profile", "linear", "--batch", "2", "--seq", "64", "--gib", "1", "--json"]
    report = json.loads(run(capsys, tmp_path, *arguments))
    assert set(report["largest_coverage_that_fits"].values()) == {1.0}


@pytest.mark.parametrize(
    "wrong",
    [
        ["--bandwidth", "-1Gbit", "--flops", "1e12"],
        ["--bandwidth", "10Gfoo", "--flops", "1e12"],
        ["--bandwidth", "10Gbit"],
        ["--bandwidth", "10Gbit", "--flops", "fast"],
        ["--gib", "0"],
        ["--num-subnetworks", "3"],
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, wrong):
    with pytest.raises(SystemExit) as exited:
        main(["estimate", "llama-134m", *wrong])
    captured = capsys.readouterr()
    assert exited.value.code == 2 and captured.out == "" and len(captured.err.strip().splitlines()) == 1


def test_a_model_of_70_billion_parameters_takes_little_memory(capsys, tmp_path):
    tiny_config(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=8192,
    ).save_pretrained(tmp_path)  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = json.loads(run(capsys, tmp_path, "--level", "block", "--json"))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert report["parameters"] > 70e9
    assert grown_kib < 300 * 1024
