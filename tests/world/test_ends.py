"""Processes that have trained end without fault, and leave no thread of a process group to the interpreter's end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "clean_ends.py"


@pytest.mark.long
def test_processes_end_cleanly(tmp_path):
    """Each end once; the script alone does many, on a busy machine."""
    command = [sys.executable, SCRIPT, "--runs", "1", "--workers", "2", "--output", tmp_path / "ends.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "ends.json").read_text())
    assert set(result["clean"].values()) == {1} and set(result["threads_left"].values()) == {0}, result
