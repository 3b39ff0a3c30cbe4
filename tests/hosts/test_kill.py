"""SIGKILL of a worker: what is there afterwards is enough to end as if nothing had happened."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))
from kill_and_resume import kill_and_compare  # noqa: E402


@pytest.mark.timeout(400)
def test_a_killed_run_ends_with_the_weights_of_the_undisturbed_one():
    """Two moments here; examples/benchmarks/kill_and_resume.py does more."""
    for result in kill_and_compare(2, seed=1):
        assert result["equal"], result
