"""What loading takes of the host's memory, for a checkpoint of 325 MB that is made here."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmarks"))
from checkpoints import NEURON, big_checkpoint, load_and_watch  # noqa: E402

from hf_sdp.bench.compare.workers import launch  # noqa: E402


def test_a_process_needs_what_it_stores_and_one_tensor(tmp_path):
    largest = big_checkpoint(tmp_path)
    checkpoint = (tmp_path / "model.safetensors").stat().st_size
    assert checkpoint > 300e6
    sliced, full = (launch(load_and_watch, 4, str(tmp_path), NEURON, s) for s in (True, False))
    for worker in sliced:
        assert worker["stored"] < checkpoint / 3.9
        assert worker["resident"] < worker["stored"] + largest + 20e6
    assert all(worker["resident"] > checkpoint for worker in full)  # the measure sees it
