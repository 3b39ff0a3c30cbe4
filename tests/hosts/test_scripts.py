"""The scripts of the ecosystem, as they are: the runs of examples/benchmarks/existing_scripts.py."""

import importlib.util
from pathlib import Path

import pytest

FILE = Path(__file__).parents[2] / "examples" / "benchmarks" / "existing_scripts.py"
spec = importlib.util.spec_from_file_location("existing_scripts", FILE)
existing_scripts = importlib.util.module_from_spec(spec)
spec.loader.exec_module(existing_scripts)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("level", ["block", "neuron"])
def test_scripts_train_with_sdp_and_what_they_save_is_what_they_report(tmp_path, level):
    """Some go on from what others have saved."""
    rows = [existing_scripts.run(name, level, 2, tmp_path) for name in existing_scripts.RUNS]
    assert [row.script for row in rows if not row.is_right] == []
    assert sum(row.bytes_of_ddp < 0.8 for row in rows) > len(rows) / 2
