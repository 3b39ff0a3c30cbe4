"""The scripts of the ecosystem, as they are: the runs of examples/benchmarks/existing_scripts.py."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "examples" / "benchmarks" / "existing_scripts.py"
spec = importlib.util.spec_from_file_location("existing_scripts", FILE)
existing_scripts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(existing_scripts)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("level", ["block", "neuron"])
def test_scripts_train_with_sdp_and_what_they_save_is_what_they_report(tmp_path, level):
    """Some go on from what others have saved."""
    rows = [existing_scripts.run(name, level, 2, tmp_path) for name in existing_scripts.RUNS]
    assert [row.script for row in rows if not row.is_right] == []
    assert sum(row.bytes_of_ddp < 0.8 for row in rows) > len(rows) / 2


@pytest.mark.long
@pytest.mark.parametrize("script", ["accumulation.py", "operations.py"])
def test_what_accelerates_scripts_check_holds_under_ddp(tmp_path, script):
    """They know nothing of SDP."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [existing_scripts.SCRIPTS / script, "--output_dir", tmp_path]
    environment = os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    done = subprocess.run(map(str, command), capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
