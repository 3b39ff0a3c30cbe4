"""The command hf-sdp: how it is called, its help, and what it refuses."""

import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hf_sdp.cli import main
from tests.support.cli import refused

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "Missing argument 'MODEL'"),
        (["plan", ""], "MODEL is empty"),
        (["plan", "/no/such/folder"], "There is no folder or file /no/such/folder"),
        (["plan", "no_such.json"], "There is no folder or file no_such.json"),
        (["plan", "a/b/c"], "'a/b/c' is no named size .llama-134m.*from the hub"),
        (["plan", os.path.dirname(__file__)], "has no config.json"),
        (["plan", "llama-134m", "--workers", "-8"], "-8 is not in the range"),
        (["plan", "llama-134m", "--coverage", "-0.5"], r"coverage must be in \(0, 1\]"),
        (["plan", "llama-134m", "--coverage", "half"], "'half' is no list of numbers"),
        (["plan", "llama-134m", "--coverage", "0.3"], "Nearest coverage that can be met: 0.25"),
        (["plan", "llama-134m", "--seq", "-1"], "-1 is not in the range"),
        (["plan", "llama-134m", "--memory-gib", "-1"], "memory_gib must list a positive number"),
        (["plan", "llama-134m", "--num-subnetworks", "3"], "num_subnetworks=3 does not divide the world of 8"),
        (["plan", "llama-134m", "--batch", "4"], "--batch has no effect without --memory-gib"),
        (
            ["plan", "llama-134m", "--sharding", "none", "--reshard-after-forward"],
            "reshard_after_forward=True has no effect",
        ),
        (["plan", "llama-134m", "--picture", "plan.gif"], "must end in one of .png, .svg"),
        (["plan", "llama-134m", "--picture", "/no/such/plan.png"], "there is no folder /no/such"),
        (["plan", "llama-134m", "--unknown"], "No such option '--unknown'"),
        (["unknown"], "No such command 'unknown'"),
        (["verify"], "Missing argument 'FOLDER'"),
        (["verify", "/no/such/folder"], "/no/such/folder is no folder"),
        (["verify", os.path.dirname(__file__)], "is no checkpoint: it has no config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, message):
    refused(run(*arguments), message)


def test_module_and_script_are_the_same_command(run, tmp_path, monkeypatch, capsys):
    arguments = ["plan", "no/such-model"]
    here = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    module = subprocess.run(
        [sys.executable, "-m", "hf_sdp", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env=here,
    )
    assert module.returncode == 2 and module.stdout == ""
    assert module.stderr.count("\n") == 1 and "'no/such-model' is no named size" in module.stderr
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {"hf-sdp": "hf_sdp.cli:main"}
    for bare in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["/some/where/hf-sdp", *bare])
        main()  # as the installed script calls it
        by_script = capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["/some/where/hf_sdp/__main__.py", *bare])
        runpy.run_module("hf_sdp", run_name="__main__")
        assert capsys.readouterr() == by_script
        assert "verify" in by_script.out and by_script.err == ""


def test_help_names_every_option(run):
    code, out, _ = run("plan", "--help")
    assert code == 0
    for option in ("--workers", "--level", "--coverage", "--picture", "--seq", "--json", "--memory-gib"):
        assert option in out
