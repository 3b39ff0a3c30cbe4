"""A worker that cannot write."""

import re
from pathlib import Path

import pytest

from tests.support.resume import NEURON, RUN, assert_equal, weights_of
from tests.support.trainer import make_trainer
from tests.support.workers import run_workers


def fail_to_save(folder, what: str, rank: int):
    """One worker cannot write: no file of it may become larger than 60 kB, or one call fails as on a full disk."""
    import resource

    import hf_sdp.hosts.trainer_checkpoint

    trainer = make_trainer(folder, NEURON, {**RUN, "save_steps": 1, "max_steps": 1})
    trainer.train()
    trainer.state.global_step = 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.MonkeyPatch.context() as patch:
        if trainer.args.process_index == rank:

            def full(*args, **kwargs):
                raise OSError(28, "No space left on device")

            if what == "large files":
                resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
            elif what == "scheduler":
                patch.setattr(hf_sdp.hosts.trainer_checkpoint.torch, "save", full)
            elif what == "random numbers":
                patch.setattr(trainer, "_save_rng_state", full)
            elif what == "marker":
                patch.setattr("hf_sdp.checkpoint.marker.os.replace", full)
        try:
            with pytest.raises(Exception) as raised:  # noqa: PT011, the kind is that of whoever wrote
                trainer._save_checkpoint(trainer.model, None)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    left = sorted(p.name for p in Path(folder).iterdir())
    trainer.state.global_step = 3
    trainer._save_checkpoint(trainer.model, None)  # and nobody is left in some collective
    return str(raised.value), left


@pytest.mark.parametrize(
    ("what", "rank"),
    [("large files", 0), ("large files", 2), ("scheduler", 0), ("random numbers", 1), ("marker", 0)],
)
def test_a_worker_that_cannot_write_is_an_error_on_all_and_leaves_other_checkpoints_alone(tmp_path, what, rank):
    results = run_workers(fail_to_save, tmp_path, what, rank)
    for error, _ in results:
        assert re.search("No space|File too large", error), error
    assert results[0][1] == ["checkpoint-1"]  # rank 0 tidies up
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-3"]
    assert_equal(weights_of(tmp_path / "checkpoint-1"), weights_of(tmp_path / "checkpoint-3"))
