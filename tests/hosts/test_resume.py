"""Stopping and continuing: exactly, in another world, under another plan, and from and to plain training."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from models import tiny_config
from safetensors.torch import load_file
from test_trainer import Rows, losses_of, make_trainer, norms_of
from workers import run_workers

import hf_sdp
from hf_sdp import SDPConfig, SDPConfigError, SDPStateError
from hf_sdp.checkpoint import tensors as boxes
from hf_sdp.checkpoint.folder import OPTIMIZER, finish_all_interrupted, newest_complete
from hf_sdp.checkpoint.optimizer_state import TENSORS

RUN = dict(
    max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=1, lr_scheduler_type="linear",
    warmup_steps=2,
)  # fmt: skip
DROPOUT = dict(attention_dropout=0.1)  # random numbers of every worker matter


def train(folder, sdp, arguments=None, resume=None, model=None):
    """Weights are compared through the last checkpoint; what is returned is what was logged."""
    hf_sdp.enable()
    trainer = make_trainer(folder, sdp, {**RUN, **(arguments or {})}, {**DROPOUT, **(model or {})})
    trainer.train(resume_from_checkpoint=resume)
    return losses_of(trainer.state.log_history), norms_of(trainer.state.log_history)


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def optimizer_of(folder) -> dict[str, torch.Tensor]:
    """Every tensor of the optimizer's state in full, by ``name/key``; of a plain checkpoint as well."""
    folder = Path(folder)
    if not (folder / OPTIMIZER).is_dir():
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        decay = [n for n, p in names_and_shapes() if len(p) > 1]
        names = decay + [n for n, p in names_and_shapes() if len(p) == 1]
        return {
            f"{names[i]}/{key}": value
            for i, state in saved["state"].items()
            for key, value in state.items()
            if value.dim() > 0
        }
    result, targets = {}, {}
    for name, (shape, dtype) in boxes.stored(folder / OPTIMIZER / TENSORS).items():
        result[name] = torch.empty(shape, dtype=dtype)
        targets[name] = boxes.Boxes(shape, dtype)
        targets[name].add(tuple((0, size) for size in shape), result[name])
    boxes.read(folder / OPTIMIZER / TENSORS, targets, None)
    return result


def names_and_shapes():
    return hf_sdp.make_plan(tiny_config(), SDPConfig(), 4).shapes.items()


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]):
    assert a.keys() == b.keys() and a
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "sgd"])
@pytest.mark.parametrize(
    "sdp",
    [
        *(dict(level=level, masking=masking) for level in ("neuron", "block") for masking in ("forward", "backward")),
        dict(
            coverage=[0.75, 0.5, 0.5, 0.25], sharding="none"
        ),  # several parts of one parameter, other ones on each worker
    ],
    ids=str,
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, sdp, optimizer):
    options = {"optim": optimizer, **({"optim_args": "momentum=0.9"} if optimizer == "sgd" else {})}
    whole = run_workers(train, tmp_path / "whole", sdp, options)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "parted" / "checkpoint-3")
    rest = run_workers(train, tmp_path / "parted", sdp, options, True)
    assert rest == whole  # the log of the first steps is in the checkpoint
    assert_equal(weights_of(tmp_path / "whole/checkpoint-6"), weights_of(tmp_path / "parted/checkpoint-6"))
    assert_equal(optimizer_of(tmp_path / "whole/checkpoint-6"), optimizer_of(tmp_path / "parted/checkpoint-6"))


def load_and_save(folder, checkpoint, sdp, arguments=None):
    """Resume, and save before a step is taken; then go on."""
    from transformers import TrainerCallback

    class Saved(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trainer.state.global_step += 100  # a name of its own
            trainer._save_checkpoint(trainer.model, None)
            trainer.state.global_step -= 100

    hf_sdp.enable()
    trainer = make_trainer(folder, sdp, {**RUN, "save_strategy": "no", "max_steps": 5, **(arguments or {})})
    trainer.add_callback(Saved())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return losses_of(trainer.state.log_history)


NEURON = dict(level="neuron", coverage=0.5)
PARTS = dict(level="neuron", coverage=0.75)
UNEQUAL = dict(level="block", coverage=[0.75, 0.5, 0.5, 0.5], always_held=[0])


@pytest.mark.parametrize(
    ("written", "wrote_world", "read", "read_world"),
    [
        (NEURON, 4, dict(level="block", coverage=0.5), 2),
        (NEURON, 4, dict(coverage=1.0), 4),
        (NEURON, 4, None, 1),
        (dict(level="block", coverage=0.5), 4, dict(masking="backward"), 4),
        (dict(level="block", block_granularity="layer"), 4, {**PARTS, "sharding": "none"}, 4),
        (dict(masking="backward"), 4, {**NEURON, "num_subnetworks": 2}, 4),
        (None, 1, UNEQUAL, 4),
        (None, 4, dict(level="block"), 4),
        (UNEQUAL, 4, dict(coverage=0.5), 2),
        (dict(coverage=0.5), 2, dict(coverage=0.25), 4),
        (NEURON, 4, None, 2),
    ],
    ids=str,
)
def test_every_element_comes_over_into_another_world_and_plan(tmp_path, written, wrote_world, read, read_world, caplog):
    run_workers(train, tmp_path, written, dict(max_steps=3), world_size=wrote_world)
    checkpoint = tmp_path / "checkpoint-3"
    losses = run_workers(load_and_save, tmp_path / "read", checkpoint, read, world_size=read_world)
    again = tmp_path / "read" / "checkpoint-103"
    assert_equal(weights_of(checkpoint), weights_of(again))
    assert_equal(optimizer_of(checkpoint), optimizer_of(again))
    assert len(losses[0]) == 5 and all(loss == losses[0] for loss in losses)


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
    ]
    for folder, message in cases:
        errors = run_workers(read_or_fail, tmp_path / "out", NEURON, str(folder))
        assert all(message in e for e in errors), (message, errors)
    errors = run_workers(read_or_fail, tmp_path / "out", NEURON, str(good), dict(intermediate_size=96))
    assert all("These are the weights of another model" in e and "(64, 32)" in e for e in errors)
    errors = run_workers(read_or_fail_keeping_weights, tmp_path / "out", str(good))
    assert all("has the state of AdamW, this run trains with SGD" in e for e in errors)
    weights_only = damage("weights-only", lambda f: remove_optimizer(f))
    errors = run_workers(read_or_fail_keeping_weights, tmp_path / "out", str(weights_only))
    assert all("has no optimizer state" in e for e in errors)


def read_or_fail_keeping_weights(folder, checkpoint):
    trainer = make_trainer(folder, NEURON, {**RUN, "optim": "sgd"})
    with pytest.raises(SDPStateError) as raised:
        trainer.train(resume_from_checkpoint=checkpoint)
    return str(raised.value)


def truncate(file: Path):
    file.write_bytes(file.read_bytes()[:-100])


def plain_and_cut(folder: Path):
    for name in ("sdp_checkpoint.json", "sdp_plan.json"):
        (folder / name).unlink()
    shutil.rmtree(folder / OPTIMIZER)
    truncate(folder / "model.safetensors")


def remove_optimizer(folder: Path):
    for name in ("sdp_checkpoint.json", "sdp_plan.json", "optimizer.pt"):
        (folder / name).unlink()
    shutil.rmtree(folder / OPTIMIZER)


def test_the_newest_complete_checkpoint_is_taken(tmp_path):
    run_workers(train, tmp_path, NEURON)
    assert newest_complete(tmp_path).endswith("checkpoint-6")
    marker = json.loads((tmp_path / "checkpoint-6" / "sdp_checkpoint.json").read_text())
    assert marker["world_size"] == 4 and marker["sdp_config"]["coverage"] == 0.5
    assert marker["versions"]["torch"] == torch.__version__
    plan = hf_sdp.Plan.from_json((tmp_path / "checkpoint-6" / "sdp_plan.json").read_text())
    assert plan.hash == marker["plan_hash"]
    truncate(tmp_path / "checkpoint-6" / "model.safetensors")
    assert newest_complete(tmp_path).endswith("checkpoint-3")
    losses, _ = run_workers(train, tmp_path, NEURON, None, True)[0]
    assert len(losses) == 6 and newest_complete(tmp_path).endswith("checkpoint-6")  # written anew in its place
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("_")] == []


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


def best_after_moving(folder):
    """The best checkpoint is found again in a run's folder that was moved."""
    arguments = {**RUN, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    trainer = make_trainer(f"{folder}/b", NEURON, {**arguments, "learning_rate": 5.0, "max_steps": 4})
    trainer.train(resume_from_checkpoint=True)
    return trainer.state.best_model_checkpoint, trainer.state.best_global_step


def test_the_best_checkpoint_is_found_in_a_folder_that_was_moved(tmp_path):
    run_workers(train_with_best, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    for folder, step in run_workers(best_after_moving, tmp_path):
        assert folder == str(tmp_path / "b" / f"checkpoint-{step}")


def train_with_best(folder):
    arguments = {**RUN, "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    make_trainer(folder, NEURON, {**arguments, "learning_rate": 5.0, "max_steps": 2}).train()


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
                patch.setattr("hf_sdp.checkpoint.folder.os.replace", full)
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


def best_and_rotation(folder):
    arguments = dict(
        **RUN, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True, metric_for_best_model="loss",
        save_total_limit=1, learning_rate=3e-1,
    )  # fmt: skip
    arguments.update(save_steps=1, save_strategy="best")
    trainer = make_trainer(folder, NEURON, arguments)
    trainer.train()
    return trainer.state.best_model_checkpoint, trainer.state.best_metric


def test_best_is_a_folder_that_exists_and_is_in_its_own_record(tmp_path):
    best, metric = run_workers(best_and_rotation, tmp_path)[0]
    assert Path(best).parent == tmp_path and [p.name for p in tmp_path.iterdir()] == [Path(best).name]
    recorded = json.loads((Path(best) / "trainer_state.json").read_text())
    assert (recorded["best_model_checkpoint"], recorded["best_metric"]) == (best, metric)


def resume_without_hf_sdp(folder):
    """A plain Trainer must not silently go on with a fresh optimizer."""
    from models import tiny_model
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(output_dir=str(folder), **{**RUN, "use_cpu": True, "report_to": "none"})
    trainer = Trainer(model=tiny_model(), args=args, train_dataset=Rows(64))
    with pytest.raises(ValueError, match="different number of parameter groups"):
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3")


def test_a_trainer_without_hf_sdp_fails_loudly(tmp_path):
    run_workers(train, tmp_path, NEURON, dict(max_steps=3))
    run_workers(resume_without_hf_sdp, tmp_path, world_size=1)
