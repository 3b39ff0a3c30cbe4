"""Checkpoints that cannot be resumed, and what a kill leaves behind."""

import shutil
from pathlib import Path

import pytest
import torch

import hf_sdp
from hf_sdp import SDPConfigError, SDPStateError
from hf_sdp.checkpoint.folder import finish_all_interrupted, newest_complete
from hf_sdp.checkpoint.marker import OPTIMIZER
from hf_sdp.checkpoint.saved_optimizer import TENSORS
from hf_sdp.engine.sharded import find_sharded
from tests.support.models import tiny_model
from tests.support.resume import NEURON, RUN, reseal, train, truncate
from tests.support.trainer import Rows, make_trainer
from tests.support.workers import run_workers


def read_or_fail(folder, sdp, checkpoint, model=None, arguments=None):
    try:
        trainer = make_trainer(folder, sdp, {**RUN, **(arguments or {})}, model)
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.train(resume_from_checkpoint=checkpoint)
        raise AssertionError("resumed")
    except (SDPConfigError, SDPStateError) as error:
        assert all(torch.equal(before[n], p) for n, p in trainer.model.named_parameters())
        return str(error)


def test_folders_that_cannot_be_resumed_say_why_on_every_rank(tmp_path):
    run_workers(train, tmp_path / "good", NEURON, dict(max_steps=3))
    good = tmp_path / "good" / "checkpoint-3"
    part = next(p for p in (good / OPTIMIZER / TENSORS).glob("*.distcp"))

    def damage(name, how):
        folder = shutil.copytree(good, tmp_path / name)
        how(folder)
        return folder

    cases = [
        (damage("no-marker", lambda f: (f / "sdp_checkpoint.json").unlink()), "no sdp_checkpoint.json"),
        (damage("missing", lambda f: (f / OPTIMIZER / TENSORS / part.name).unlink()), f"{part.name} is missing"),
        (damage("cut", lambda f: truncate(f / "model.safetensors")), "model.safetensors has"),
        (damage("marker", lambda f: truncate(f / "sdp_checkpoint.json")), "sdp_checkpoint.json cannot be read"),
        (damage("plain-cut", plain_and_cut), "cut short"),
        *(
            (
                damage(f"flipped-{Path(file).name}", lambda f, file=file: flip(f / file)),
                f"the content of {file} has changed",
            )
            for file in ("model.safetensors", f"{OPTIMIZER}/{TENSORS}/{part.name}", "trainer_state.json")
        ),
    ]
    cases += [
        (damage(f"state-{number}", lambda f, text=text: reseal(f, "trainer_state.json", text)), "trainer_state.json")
        for number, text in enumerate(["[]", "{", '{"global_step": "3"}'])
    ]
    for folder, message in cases:
        errors = run_workers(read_or_fail, tmp_path / "out", NEURON, str(folder))
        assert all(message in e for e in errors), (message, errors)
    errors = run_workers(read_or_fail, tmp_path / "out", NEURON, str(good), dict(intermediate_size=96))
    assert all("These are the weights of another model" in e and "(64, 32)" in e for e in errors)
    other_rope = dict(rope_parameters={"rope_type": "default", "rope_theta": 5e5}, rms_norm_eps=1e-5, use_cache=False)
    said = "rms_norm_eps=1e-06 there, 1e-05 here; rope_parameters.rope_theta=10000.0 there, 500000.0 here."
    errors = run_workers(read_or_fail, tmp_path / "out", NEURON, str(good), other_rope)
    assert all("config.json is of another model" in e and said in e for e in errors), errors
    errors = run_workers(read_or_fail, tmp_path / "out", dict(simulate=4), str(good), other_rope, world_size=1)
    assert said in errors[0]
    errors = run_workers(read_or_fail_keeping_weights, tmp_path / "out", str(good))
    assert all("has the state of AdamW, this run trains with SGD" in e for e in errors)
    weights_only = damage("weights-only", lambda f: remove_optimizer(f))
    errors = run_workers(read_or_fail_keeping_weights, tmp_path / "out", str(weights_only))
    assert all("has no optimizer state" in e for e in errors)


def read_or_fail_keeping_weights(folder, checkpoint):
    """The optimizer is refused when the model is sharded already; the weights are those of rank 0's new model."""
    trainer = make_trainer(folder, NEURON, {**RUN, "optim": "sgd"})
    with pytest.raises(SDPStateError) as raised:
        trainer.train(resume_from_checkpoint=checkpoint)
    weights = hf_sdp.consolidate(trainer.model) if find_sharded(trainer.model) else None
    if weights is not None:
        new = tiny_model(seed=0)
        assert all(torch.equal(weights[n], t) for n, t in new.state_dict().items())
    assert trainer.optimizer is None or not trainer.optimizer.state
    return str(raised.value)


def flip(file: Path):
    """One bit, in the middle; the size stays."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def plain_and_cut(folder: Path):
    for name in ("sdp_checkpoint.json", "sdp_plan.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / OPTIMIZER)
    truncate(folder / "model.safetensors")


def remove_optimizer(folder: Path):
    for name in ("sdp_checkpoint.json", "sdp_plan.json", "optimizer.pt"):
        (folder / name).unlink()
    shutil.rmtree(folder / OPTIMIZER)


def test_what_a_kill_leaves_behind(tmp_path):
    run_workers(train, tmp_path, NEURON)
    # Killed between the two renames: the new one is complete.
    (tmp_path / "_unfinished-checkpoint-6").mkdir()
    (tmp_path / "checkpoint-6").rename(tmp_path / "_unfinished-checkpoint-6" / "checkpoint-6")
    # Killed while the marker was being written.
    shutil.copytree(tmp_path / "checkpoint-3", tmp_path / "_unfinished-checkpoint-9" / "checkpoint-9")
    (tmp_path / "_unfinished-checkpoint-9" / "checkpoint-9" / "sdp_checkpoint.json").write_text("")
    finish_all_interrupted(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir() and p.name != "runs") == [
        "checkpoint-3",
        "checkpoint-6",
    ]
    assert newest_complete(tmp_path).endswith("checkpoint-6")
    flip(tmp_path / "checkpoint-6" / "trainer_state.json")
    assert newest_complete(tmp_path).endswith("checkpoint-3")


def resume_without_hf_sdp(folder):
    """A plain Trainer must not silently go on with a fresh optimizer."""
    from transformers import Trainer, TrainingArguments

    from tests.support.models import tiny_model

    args = TrainingArguments(output_dir=str(folder), **{**RUN, "use_cpu": True, "report_to": "none"})
    trainer = Trainer(model=tiny_model(), args=args, train_dataset=Rows(64))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3")


def test_a_trainer_without_hf_sdp_fails_loudly(tmp_path):
    run_workers(train, tmp_path, NEURON, dict(max_steps=3))
    run_workers(resume_without_hf_sdp, tmp_path, world_size=1)
