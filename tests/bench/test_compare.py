"""The measured comparison: its engines, what it measures, limited networks, failing workers, refused input."""

import csv
import json
import sys

import pytest
import torch
import torch.distributed as dist

from hf_sdp import SDPConfig, SDPConfigError
from hf_sdp.bench.compare import run
from hf_sdp.bench.compare.contenders import BASELINES, Contender, Workplace, expected_bytes, sdp_name
from hf_sdp.bench.compare.losses import curves
from hf_sdp.bench.compare.measure import Sample, Samples
from hf_sdp.bench.workers import WorkerError
from hf_sdp.cli import main
from hf_sdp.cli.compare_command import parse_sdp
from hf_sdp.families.meta_model import meta_model
from tests.support.models import tiny_config
from tests.support.workers import run_workers

TINY = "--hidden-size 32 --intermediate-size 64 --layers 4 --heads 4 --vocab-size 64 --seq 16 --workers 2".split()
VARIANTS = [SDPConfig(coverage=0.5), SDPConfig(level="block", coverage=0.5, sharding="none")]
ENGINES = {name: None for name in BASELINES.values()} | {sdp_name(sdp): sdp for sdp in VARIANTS}


def test_command(tmp_path, monkeypatch):
    """All passes with real workers; every figure that can be known beforehand."""
    arguments = [*TINY, "--engines", "ddp,fsdp2,sdp", "--sdp", "coverage=0.5", "--rounds", "2", "--loss-steps", "4"]
    monkeypatch.setattr(sys, "argv", ["hf-sdp", "compare", *arguments])
    try:
        main(["compare", *arguments, "--output", str(tmp_path)])
    except SystemExit as exit:
        assert not exit.code
    result = json.loads((tmp_path / "comparison.json").read_text())
    assert result["command"].startswith("hf-sdp compare --hidden-size 32")
    model, sdp = tiny_config(), SDPConfig(coverage=0.5)
    engines = {"DDP": None, "FSDP2": None, "SDP neuron C=0.5": sdp}
    assert list(result["memory"]) == list(result["times"]["none"]) == list(engines)
    full = 4 * sum(p.numel() for p in meta_model(model).parameters())
    for name, memory in result["memory"].items():
        assert memory["bytes_sent"] == pytest.approx(expected_bytes(name, engines[name], model, 2), rel=1e-3), name
        stored = full if name == "DDP" else full // 2
        assert (memory["parameters"], memory["gradients"], memory["optimizer"]) == (stored, stored, 2 * stored)
        assert memory["buckets"] == (full if name == "DDP" else 0)
        assert memory["peak"] > 3 * stored + memory["buckets"]
    assert result["memory"]["DDP"]["flops"] == result["memory"]["FSDP2"]["flops"]
    assert result["memory"]["SDP neuron C=0.5"]["flops"] < result["memory"]["DDP"]["flops"]
    for times in result["times"]["none"].values():
        assert len(times["steps_s"]) == len(times["silent_steps_s"]) == 2
        parts = sum(times[f"{part}_s"] for part in ("forward", "backward", "exposed", "optimizer"))
        assert parts == pytest.approx(times["step_s"])
    found = result["losses"]["curves"]
    assert {name: curve["engines"] for name, curve in found.items()} == curves(engines)
    data_parallel, subnetworks = found["DDP"]["evaluation"], found["SDP neuron C=0.5"]["evaluation"]
    assert subnetworks[0] == pytest.approx(data_parallel[0], abs=1e-5)  # the full model, before the first step
    assert data_parallel[-1] < data_parallel[0] and abs(subnetworks[-1] - data_parallel[-1]) > 1e-5
    with open(tmp_path / "comparison.csv", newline="") as file:
        assert [row["engine"] for row in csv.DictReader(file)] == list(engines)
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"comparison.md", "memory.png", "traffic.png", "step_time.png", "loss.png"}
    assert (tmp_path / "comparison.md").read_text().count("| SDP neuron C=0.5 |") == 3


def engines_alone() -> dict[str, dict]:
    """Rank 0 makes steps without communication while rank 1 waits elsewhere; then both make one with it."""
    workplace = Workplace(model=tiny_config(use_cache=False), workers=2, batch=2, sequence=16)
    found = {}
    for name, sdp in ENGINES.items():
        engine = Contender(name, sdp, workplace)
        ids = workplace.random_ids(torch.Generator().manual_seed(dist.get_rank()))
        first = engine.forward(ids)
        first.backward()
        engine.update()
        engine.step(ids)  # at the start of the second step DDP's workers agree on their buckets, once
        before = engine.traffic.num_collectives
        if dist.get_rank() == 0:
            with engine.without_communication():
                engine.step(ids)
                engine.step(ids)
        silent = engine.traffic.num_collectives - before
        dist.barrier()
        engine.step(ids)
        with torch.no_grad():
            after = engine.forward(ids)
        with_communication = engine.traffic.num_collectives - before
        found[name] = dict(first=first.item(), after=after.item(), silent=silent, loud=with_communication)
    return found


def test_engines_with_and_without_communication():
    for found in run_workers(engines_alone, world_size=2):
        for name, figures in found.items():
            assert figures["silent"] == 0 < figures["loud"], name
            assert figures["after"] < 2 * figures["first"], name  # finite and no worse than garbage of the usual size
        for name in BASELINES.values():
            assert found[name]["first"] == pytest.approx(found["DDP"]["first"], abs=1e-5), name


def test_failing_worker_is_exit_code_1(tmp_path, monkeypatch, capsys):
    def failing(*args, **kwargs):
        raise WorkerError(3, "Traceback ...\nRuntimeError: out of luck\n")

    monkeypatch.setattr(run, "launch", failing)
    with pytest.raises(SystemExit) as exit:
        main(["compare", *TINY, "--output", str(tmp_path)])
    assert exit.value.code == 1
    assert capsys.readouterr().err.startswith("hf-sdp: rank 3: RuntimeError: out of luck")
    assert "Traceback ..." in (tmp_path / "failure.txt").read_text()


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--batch 0", "'--batch': 0"),
        ("--engines ddp,zero", "no engine 'zero'"),
        ("--engines ddp --sdp level=block", "no effect"),
        ("--throttle=-1Gbit", "'-1Gbit' is no bandwidth"),
        ("--throttle 0Mbit", "'0Mbit' is no bandwidth"),
        ("--throttle 5parsec", "'5parsec' is no bandwidth"),
        ("--sdp level", "'level' is not understood"),
        ("--sdp color=red", "'color=red' is not understood"),
        ("--sdp level=layer", "level must be one of"),
        ("--workers 1", "at least 2 workers"),
        ("--model llama-134m --layers 3", "--layers"),
        ("--model llama-134m --seq 5000", "4096 positions"),
        ("--heads 5", "must divide"),
    ],
)
def test_refused_with_one_line(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["compare", *arguments.split(), "--output", str(tmp_path)])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and words in error


def test_more_workers_than_gpus_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SystemExit) as exit:
        main(["compare", "--device", "cuda", "--workers", "4", "--output", str(tmp_path)])
    assert exit.value.code == 2 and "4 workers need a GPU each, this machine has 2" in capsys.readouterr().err


def test_summary_takes_the_slowest_worker():
    def samples(*seconds):
        return [Sample(s, 2 * s, s, 0.5, None) for s in seconds]

    found = run.summary([Samples(samples(1, 2, 6), samples(1, 1, 1)), Samples(samples(3, 1, 2), samples(0.5, 2, 2))])
    assert found["steps_s"] == [12, 8, 24] and found["step_s"] == 12 and found["range_s"] == [8, 24]
    assert (found["forward_s"], found["backward_s"], found["optimizer_s"]) == (2, 4, 2)
    assert found["exposed_s"] == 4 and found["cpu_s"] == 1 and "wire_bytes" not in found


def test_names_and_curves_of_variants():
    variants = [
        "coverage=0.5",
        "level=block,coverage=0.5,sharding=none",
        "level=block,coverage=0.5,reshard_after_forward=true",
        "coverage=1",
    ]
    engines = {sdp_name(sdp): sdp for sdp in (SDPConfig(**parse_sdp(text)) for text in variants)}
    assert list(engines) == [
        "SDP neuron C=0.5",
        "SDP block C=0.5, sharding none",
        "SDP block C=0.5, reshard",
        "SDP neuron C=1",
    ]
    assert curves({"FSDP2": None, **engines}) == {
        "FSDP2": ["FSDP2", "SDP neuron C=1"],
        "SDP neuron C=0.5": ["SDP neuron C=0.5"],
        "SDP block C=0.5, sharding none": ["SDP block C=0.5, sharding none", "SDP block C=0.5, reshard"],
    }
    assert parse_sdp("coverage=0.75,0.5,level=block") == {"coverage": (0.75, 0.5), "level": "block"}
    assert parse_sdp("always_held=0") == {"always_held": (0,)}
    with pytest.raises(SDPConfigError, match="workload"):
        parse_sdp("workload=batch")
