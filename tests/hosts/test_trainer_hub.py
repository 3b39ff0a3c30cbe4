"""``push_to_hub``: what is uploaded is the full model. Only the network is replaced."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file

from hf_sdp import consolidate
from tests.support.models import tiny_model
from tests.support.trainer import make_trainer
from tests.support.workers import run_workers

SAVED = dict(max_steps=2, gradient_accumulation_steps=1, save_strategy="steps", save_steps=1)


class Done:
    def done(self) -> bool:
        return True


def push(folder):
    uploads, arguments = (
        [],
        dict(push_to_hub=True, hub_model_id="someone/small", hub_strategy="all_checkpoints", **SAVED),
    )

    def upload_folder(self, *, repo_id, folder_path, path_in_repo="", run_as_future=False, **kwargs):
        weights = {name: t.clone() for name, t in load_file(Path(folder_path, "model.safetensors")).items()}
        uploads.append((repo_id, path_in_repo, sorted(p.name for p in Path(folder_path).iterdir()), weights))
        return Done()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HfApi, "create_repo", lambda self, repo, **kwargs: SimpleNamespace(repo_id=repo))
        patch.setattr(HfApi, "upload_folder", upload_folder)
        trainer = make_trainer(folder, dict(level="block"), arguments)
        patch.setattr(trainer, "create_model_card", lambda **kwargs: None)  # asks the hub for the model's name
        trainer.train()
        trainer.push_to_hub()
    return uploads, consolidate(trainer.model)


@pytest.mark.long
def test_what_is_pushed_is_the_full_model(tmp_path):
    (uploads, weights), (others, _) = run_workers(push, tmp_path, world_size=2)
    assert others == []
    assert [path for _, path, *_ in uploads] == ["", "checkpoint-1", "", "checkpoint-2", ""]
    shapes = {name: tensor.shape for name, tensor in tiny_model().state_dict().items()}
    for repo, path, files, uploaded in uploads:
        assert repo == "someone/small" and {name: tensor.shape for name, tensor in uploaded.items()} == shapes
        assert ("sdp_plan.json" in files) == bool(path) and "config.json" in files
    for name, tensor in uploads[-1][3].items():
        assert torch.equal(tensor, weights[name]) and torch.equal(tensor, uploads[-2][3][name])
    assert not torch.equal(uploads[0][3]["lm_head.weight"], weights["lm_head.weight"])
