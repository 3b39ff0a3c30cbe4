"""A worker that ends, in processes that really end (those of the other tests live on)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
from tests.support.models import batch, tiny_model
from hf_sdp import SDPAccelerator, SDPConfig, SDPStateError, patch_model

accelerator = SDPAccelerator(cpu=True)
model = accelerator.prepare(patch_model(tiny_model(), SDPConfig())).eval()
model(**batch(0))
if accelerator.process_index == int(sys.argv[1]):
    try:
        model(**batch(0))
    except SDPStateError as error:
        print(error)
"""


@pytest.mark.long
@pytest.mark.parametrize("stays", [0, 1])
def test_waiting_for_a_worker_that_has_ended_is_an_error_at_once(tmp_path, stays):
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[2]
    config = root / "configs" / "accelerate" / "cpu_2.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, tmp_path / "script.py"]
    done = subprocess.run(
        [*command, str(stays)], env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert f"Rank {stays}: a forward in eval mode is a collective" in done.stdout
    assert f"rank {1 - stays} has gone on to the end of its process" in done.stdout
