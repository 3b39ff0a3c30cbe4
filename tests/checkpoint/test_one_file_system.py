"""Workers that do not see what rank 0 sees. Another machine's folder of the same path is another folder here."""

import shutil
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_sdp import SDPConfigError
from hf_sdp.checkpoint import folder as checkpoint
from hf_sdp.checkpoint import one_file_system
from hf_sdp.checkpoint.marker import check
from hf_sdp.engine.sharded import stored_tensors
from tests.support.training import one_step, prepared
from tests.support.workers import run_workers

NOT_SEEN = r"Ranks \[2\] do not see what rank 0 sees in .*All workers must see one file system"


def save_and_load(folder: Path):
    accelerator, model, optimizer = prepared(dict())
    one_step(accelerator, model, optimizer)
    rank = dist.get_rank()
    mine = folder / ("machine-2" if rank == 2 else "machine-0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_file_system, "_LAG_S", 0.1)
        with pytest.raises(SDPConfigError, match=NOT_SEEN):
            accelerator.save_state(mine / "checkpoint-1")
        dist.barrier()
        assert [p.name for p in (folder / "machine-0").iterdir()] == []
    save_where_listings_lag(accelerator, folder)
    before = [tensor.clone() for _, tensor in stored_tensors(model)]
    one_step(accelerator, model, optimizer)
    accelerator.save_state(folder / "machine-0" / "checkpoint-2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(one_file_system, "_LAG_S", 0.1)
        after = [tensor.clone() for _, tensor in stored_tensors(model)]
        with pytest.raises(SDPConfigError, match=NOT_SEEN):
            accelerator.load_state(mine / "checkpoint-1")
        assert all(torch.equal(a, t) for a, (_, t) in zip(after, stored_tensors(model), strict=True))
        with pytest.raises(SDPConfigError, match=NOT_SEEN):  # and not: "there is no checkpoint, begin anew"
            checkpoint.newest_complete(mine)
        if rank == 3:  # its listing has not seen the newest one yet
            patch.setattr(checkpoint, "checkpoints_of", lambda output_dir: ["checkpoint-1"])
        newest = checkpoint.newest_complete(folder / "machine-0")
    accelerator.load_state(folder / "machine-0" / "checkpoint-1")
    assert all(torch.equal(b, t) for b, (_, t) in zip(before, stored_tensors(model), strict=True))
    return newest


def save_where_listings_lag(accelerator, folder: Path):
    """Rank 1 sees the folder late, and rank 0 never lists what others have written."""
    rglob, rank = Path.rglob, dist.get_rank()
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(Path, "rglob", lambda self, what: [p for p in rglob(self, what) if "_3" not in p.name])
        if rank == 1:
            late = folder / "late"
            threading.Timer(0.5, lambda: late.symlink_to(folder / "machine-0")).start()
        accelerator.save_state(folder / ("late" if rank == 1 else "machine-0") / "checkpoint-1")


def test_all_workers_must_see_one_file_system(tmp_path):
    (tmp_path / "machine-0").mkdir()
    assert run_workers(save_and_load, tmp_path) == [str(tmp_path / "machine-0" / "checkpoint-2")] * 4
    files = check(tmp_path / "machine-0" / "checkpoint-1", contents=True)["files"]
    assert "random_states_3.pkl" in files and "sdp_optimizer/tensors/__3_0.distcp" in files
    shutil.rmtree(tmp_path / "machine-0")
