"""What loading takes of the host's memory, for a checkpoint of 325 MB that is made here."""

from hf_sdp.bench.loading_memory import load_and_watch, make_checkpoint
from hf_sdp.bench.workers import launch


def test_a_process_needs_what_it_stores_and_one_tensor(tmp_path):
    largest = make_checkpoint(tmp_path)
    checkpoint = (tmp_path / "model.safetensors").stat().st_size
    assert checkpoint > 300e6
    sdp = dict(level="neuron", coverage=0.5)
    sliced, full = (launch(load_and_watch, 4, str(tmp_path), sdp, s) for s in (True, False))
    for worker in sliced:
        assert worker["stored"] < checkpoint / 3.9
        assert worker["resident"] < worker["stored"] + largest + 20e6
    assert all(worker["resident"] > checkpoint for worker in full)  # the measure sees it
