"""SIGKILL of a worker: what is there afterwards is enough to end as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "kill_and_resume.py"


@pytest.mark.timeout(400)
@pytest.mark.long
@pytest.mark.parametrize(("kills", "options"), [(1, []), (4, []), (1, ["--boundaries"])])
def test_a_killed_run_ends_with_the_weights_of_the_undisturbed_one(tmp_path, kills, options):
    """A few moments here; the script alone does more."""
    command = [sys.executable, SCRIPT, "--kills", str(kills), "--seed", "1", "--output", tmp_path / "kills.json"]
    command += options
    done = subprocess.run(command, capture_output=True, text=True, timeout=390)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "kills.json").read_text())
    assert [result["equal"] for result in results] == [True] * kills, results
