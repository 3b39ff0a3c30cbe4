"""The numbers that the Trainer and the model report: of the full model, of a subnetwork, of the world."""

import json
import logging

import pytest
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from hf_sdp import SDPConfig, consolidate, local_num_parameters, make_plan
from tests.support.models import tiny_config, tiny_model
from tests.support.trainer import make_trainer
from tests.support.workers import run_workers

ROWS, LENGTH, STEPS, WORKERS = 4, 16, 2, 2  # of a worker in a step: two micro-batches of two rows


class Lines(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record):
        self.lines.append(record.getMessage().strip())


def report(folder, sdp: dict | None):
    import transformers.trainer as host

    arguments = dict(max_steps=STEPS, include_num_input_tokens_seen="all", log_level="info")
    trainer, lines = make_trainer(folder, sdp, arguments), Lines()
    host.logger.addHandler(lines)
    try:
        trainer.train()
    finally:
        host.logger.removeHandler(lines)
        host.logger.setLevel(logging.WARNING)
    model, last = trainer.model, trainer.state.log_history
    weights = model.state_dict() if sdp is None else consolidate(model)
    model.save_pretrained(folder / "parts", state_dict=weights, max_shard_size="20KB")  # transformers writes them
    numbers = {
        "parameters": model.num_parameters(),
        "without_embeddings": model.num_parameters(exclude_embeddings=True),
        "footprint": model.get_memory_footprint(),
        "local": None if sdp is None else local_num_parameters(model),
        "flos": last[-1]["total_flos"],
        "tokens": last[-1]["num_input_tokens_seen"],
        "has_speed": any("train_tokens_per_second" in entry for entry in last),
        "stored": next((e["sdp/state_bytes_parameters_max"] for e in last if "sdp/state_bytes_max" in e), None),
    }
    return numbers, lines.lines


BACKWARD = dict(coverage=0.5, masking="backward")


@pytest.mark.parametrize(
    "sdp",
    [
        pytest.param(None, marks=pytest.mark.long),
        dict(coverage=0.5),
        pytest.param(BACKWARD, marks=pytest.mark.long),
    ],
    ids=["ddp", "forward", "backward"],
)
def test_sizes_are_of_the_full_model_operations_of_the_subnetworks_and_tokens_the_worlds(tmp_path, sdp):
    full, plan = tiny_model().num_parameters(), make_plan(tiny_config(), SDPConfig(coverage=0.5), WORKERS)
    is_cut = sdp == dict(coverage=0.5)
    held = plan.numel(0) if is_cut else full
    assert plan.full_numel == full and plan.numel(0) < 0.6 * full
    buffers = sum(b.nbytes for b in tiny_model().buffers())
    embeddings = tiny_model().get_input_embeddings().weight.numel()
    for numbers, lines in run_workers(report, tmp_path, sdp, world_size=WORKERS):
        assert numbers == {
            "parameters": full,
            "without_embeddings": full - embeddings,
            "footprint": 4 * full + buffers,
            "local": None if sdp is None else held,
            "flos": 6 * numbers["tokens"] * (held - embeddings),
            "tokens": WORKERS * STEPS * ROWS * LENGTH,
            "has_speed": True,
            "stored": None if sdp is None else 4 * full // WORKERS,
        }
        if lines:  # rank 0
            at = lines.index(f"Number of trainable parameters = {full:,}")
            said = f"Number of trainable parameters of the subnetwork of rank 0 = {held:,}"
            assert (said in lines[at + 1 :]) == is_cut
    index = json.loads((tmp_path / "parts" / SAFE_WEIGHTS_INDEX_NAME).read_text())
    assert index["metadata"]["total_parameters"] == full
