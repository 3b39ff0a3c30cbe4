"""A coverage schedule under the unmodified Trainer."""

import shutil

import pytest
import torch.distributed as dist
from transformers import AutoModelForCausalLM, Trainer, default_data_collator

import hf_sdp
from hf_sdp import SDPCallback, SDPConfig, SDPConfigError, SDPStateError, Workload, make_plan, patch_model, verify
from hf_sdp.engine import handover
from hf_sdp.estimate.memory import sdp_step
from tests.support.models import tiny_config, tiny_model
from tests.support.resume import assert_equal, optimizer_of, train, weights_of
from tests.support.runs import train_resume_and_reload
from tests.support.trainer import losses_of, make_trainer, norms_of
from tests.support.workers import run_workers

GROWS = [(0.0, 0.5), (0.5, 1.0)]
THREE = dict(level="block", coverage_schedule=["0:0.25", "0.3:0.5:masking=backward", "0.7:1.0"])  # from steps 2 and 4
OPTIMIZERS = {"adamw_torch_fused": {}, "sgd": {"optim_args": "momentum=0.9"}}


@pytest.mark.parametrize("level", ["neuron", pytest.param("block", marks=pytest.mark.long)])
def test_workers_equal_the_simulation_and_the_reloaded_checkpoint(tmp_path, level):
    sdp = dict(level=level, coverage_schedule=GROWS)
    workers, simulated = train_resume_and_reload(tmp_path, sdp, dict(task="causal", model_type="gpt2"))
    for of_workers, of_simulation in zip(workers, simulated, strict=True):
        assert of_workers == pytest.approx(of_simulation, abs=1e-4)


def resumed(folder, whole, sdp: dict, options: dict, step: int):
    parted = folder / f"from-{step}"
    shutil.copytree(whole / f"checkpoint-{step}", parted / f"checkpoint-{step}")
    logged = run_workers(train, parted, sdp, options, True)
    return logged, weights_of(parted / "checkpoint-6"), optimizer_of(parted / "checkpoint-6")


@pytest.mark.parametrize(
    ("optimizer", "sdp", "steps"),
    [
        ("adamw_torch_fused", THREE, (2, 5)),  # exactly at a boundary, and within a phase
        pytest.param("adamw_torch_fused", THREE, (1, 3, 4), marks=pytest.mark.long),
        pytest.param("sgd", THREE | dict(level="neuron", sharding="none"), range(1, 6), marks=pytest.mark.long),
        pytest.param("sgd", THREE | dict(reshard_after_forward=True), range(1, 6), marks=pytest.mark.long),
        pytest.param("adamw_torch_fused", THREE | dict(level="neuron"), range(1, 6), marks=pytest.mark.long),
    ],
)
def test_a_run_resumed_in_any_phase_is_the_uninterrupted_one_bit_for_bit(tmp_path, optimizer, sdp, steps):
    options = dict(optim=optimizer, save_steps=1, eval_strategy="steps", eval_steps=1, **OPTIMIZERS[optimizer])
    whole = run_workers(train, tmp_path / "whole", sdp, options)
    last = tmp_path / "whole" / "checkpoint-6"
    for step in steps:
        logged, weights, optimizer_state = resumed(tmp_path, tmp_path / "whole", sdp, options, step)
        assert logged == whole, step
        assert_equal(weights, weights_of(last))
        assert_equal(optimizer_state, optimizer_of(last))


def test_another_world_goes_on_in_the_phase(tmp_path):
    options = dict(save_steps=1)
    run_workers(train, tmp_path, THREE, options | dict(max_steps=6))
    shutil.copytree(tmp_path / "checkpoint-5", tmp_path / "two" / "checkpoint-5")
    sdp = THREE | dict(coverage_schedule=["0:0.5", "0.3:0.5:masking=backward", "0.7:1.0"])
    losses, _ = run_workers(train, tmp_path / "two", sdp, options, True, world_size=2)[0]
    assert len(losses) == 6


def train_to(folder, sdp: dict, max_steps: int, resume: bool = False):
    with pytest.MonkeyPatch.context() as patch:
        warned: list[str] = []
        patch.setattr(hf_sdp.phases.logger, "warning", lambda message, *values: warned.append(message % values))
        hf_sdp.enable()
        trainer = make_trainer(folder, sdp, dict(max_steps=max_steps, save_strategy="steps", save_steps=1))
        trainer.train(resume_from_checkpoint=resume)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return losses_of(logged), [entry.get("sdp/coverage") for entry in logged], warned


def test_a_longer_training_goes_back_to_the_phase_before_and_says_so(tmp_path):
    sdp = dict(coverage_schedule=GROWS)
    (losses, coverage, warned), _ = run_workers(train_to, tmp_path / "short", sdp, 4, world_size=2)
    assert coverage == [0.5, 0.5, 1, 1] and not warned
    for folder in ("long", "half"):
        shutil.copytree(tmp_path / "short" / "checkpoint-3", tmp_path / folder / "checkpoint-3")
    longer, of_rank_1 = run_workers(train_to, tmp_path / "long", sdp, 8, True, world_size=2)
    assert longer[1] == [0.5, 0.5, 1, 0.5, 1, 1, 1, 1] and of_rank_1[2] == []
    assert longer[2] == [
        "The checkpoint is of phase 1 of the coverage schedule. Step 3 of 8 is of phase 0, to which the training goes "
        "back: it has more steps than it had."
    ]
    (half, _, _), _ = run_workers(train_to, tmp_path / "half", dict(coverage=0.5), 4, True, world_size=2)
    assert longer[0][:4] == half and half[:3] == losses[:3] and half[3] != losses[3]


def train_worse_and_worse(folder):
    arguments = dict(
        learning_rate=5.0, optim="sgd", save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss",
    )  # fmt: skip
    trainer = make_trainer(folder, dict(level="block", coverage_schedule=GROWS), arguments)
    trainer.train()
    best, coverage = trainer.state.best_metric, [e["sdp/coverage"] for e in trainer.state.log_history if "loss" in e]
    return coverage, trainer.state.best_global_step, best, trainer.evaluate()["eval_loss"]


def test_the_best_checkpoint_may_be_of_an_earlier_phase(tmp_path):
    for coverage, step, best, evaluated in run_workers(train_worse_and_worse, tmp_path, world_size=2):
        assert coverage == [0.5, 0.5, 1, 1] and step <= 2 and evaluated == pytest.approx(best, abs=1e-6)


def train_twice(folder, sdp, arguments=None):
    """Without a checkpoint: the second training begins in the first phase again."""
    trainer = make_trainer(folder, sdp, dict(max_steps=4, optim="sgd", learning_rate=0.0, **(arguments or {})))
    trainer.train()
    first = losses_of(trainer.state.log_history)
    trainer.train()
    return first, losses_of(trainer.state.log_history)


def test_a_second_training_begins_in_the_first_phase(tmp_path):
    for first, second in run_workers(train_twice, tmp_path, dict(coverage_schedule=GROWS), world_size=2):
        assert second == pytest.approx(first, abs=1e-6)  # nothing is learned
        assert abs(first[0] - first[3]) > 1e-3


def train_as(folder, sdp, arguments=None):
    trainer = make_trainer(folder, sdp, dict(max_steps=6, optim="sgd", learning_rate=0.1, **(arguments or {})))
    trainer.train()
    return losses_of(trainer.state.log_history), norms_of(trainer.state.log_history)


def test_phases_that_hold_everything_are_ddp(tmp_path):
    """Moments, the learning rate and the order of the data go on."""
    sdp = dict(coverage_schedule=["0:1:level=neuron", "0.5:1:masking=backward"])
    options = dict(optim_args="momentum=0.9", lr_scheduler_type="linear", warmup_steps=2)
    scheduled = run_workers(train_as, tmp_path / "sdp", sdp, options, world_size=2)
    ddp = run_workers(train_as, tmp_path / "ddp", None, options, world_size=2)
    for mine, theirs in zip(scheduled[0], ddp[0], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("level", ["neuron", "block"])
def test_compiled_models_too(tmp_path, level):
    sdp = dict(level=level, coverage_schedule=GROWS)
    plain = run_workers(train_as, tmp_path / "plain", sdp, world_size=2)
    options = dict(torch_compile=True, torch_compile_backend="aot_eager")
    compiled = run_workers(train_as, tmp_path / "compiled", sdp, options, world_size=2, timeout_s=250)
    for mine, theirs in zip(compiled[0], plain[0], strict=True):
        assert mine == pytest.approx(theirs, abs=1e-5)


def run_out_of_memory(folder, sdp, batch: int, fails: bool):
    """In the second micro-batch of the third step. Nothing is learned."""
    options = dict(optim="sgd", learning_rate=0.0, per_device_train_batch_size=batch, auto_find_batch_size=True)
    trainer = make_trainer(folder, sdp, options)
    forwards = []

    def fail_once(module, args):
        forwards.append(module)
        if fails and len(forwards) == 6:
            raise RuntimeError("CUDA out of memory.")

    trainer.model.model.layers[2].register_forward_pre_hook(fail_once)
    trainer.train()
    verify(trainer.model)
    return losses_of(trainer.state.log_history), norms_of(trainer.state.log_history), len(forwards)


@pytest.mark.parametrize(
    "sdp",
    [
        dict(coverage_schedule=GROWS),
        pytest.param(dict(), marks=pytest.mark.long),
        pytest.param(dict(masking="backward", coverage_schedule=GROWS), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_a_training_that_runs_out_of_memory_begins_anew_in_the_first_phase(tmp_path, sdp):
    """Without the gradients of the micro-batch before."""
    again = run_workers(run_out_of_memory, tmp_path / "again", sdp, 2, True, world_size=2)
    smaller = run_workers(run_out_of_memory, tmp_path / "smaller", sdp, 1, False, world_size=2)
    for (*logged, forwards), (*expected, _) in zip(again, smaller, strict=True):
        assert logged == expected and forwards == 6 + 8


def train_split(folder, splits: int, model: dict, rows: tuple[int, int] = (3, 3), **options):
    """``rows``: of a micro-batch, on each worker."""
    sdp = dict(coverage_schedule=["0:0.5", f"0.5:1:splits={splits}"], **options)
    arguments = dict(max_steps=4, optim="sgd", learning_rate=0.1, per_device_train_batch_size=3)
    trainer = make_trainer(folder, sdp, arguments, model, ragged=True)
    trainer.data_collator = lambda batch: default_data_collator(batch[: rows[dist.get_rank()]])
    sizes = []
    trainer.model.register_forward_pre_hook(
        lambda m, args, kwargs: sizes.append(len(kwargs["labels"])), with_kwargs=True
    )
    trainer.train()
    return losses_of(trainer.state.log_history), norms_of(trainer.state.log_history), sizes


@pytest.mark.parametrize("model", [{}, dict(task="sequence classification", model_type="llama", num_labels=2)], ids=str)
def test_a_phase_splits_its_micro_batches(tmp_path, model):
    """In the second model the host does not divide by the items of the batch."""
    whole = run_workers(train_split, tmp_path / "whole", 1, model, world_size=2)
    parted = run_workers(train_split, tmp_path / "parted", 2, model, world_size=2)
    for of_whole, of_parts in zip(whole, parted, strict=True):
        assert of_parts[0] == pytest.approx(of_whole[0], abs=1e-5)
        assert of_parts[1] == pytest.approx(of_whole[1], rel=1e-4)
        assert of_whole[2] == [3] * 8 and of_parts[2] == [3] * 4 + [1, 2] * 4


@pytest.mark.parametrize("reshards", [True, pytest.param(False, marks=pytest.mark.long)])
def test_workers_have_as_many_pieces_as_the_one_with_the_fewest_rows(tmp_path, reshards):
    options = dict(rows=(2, 3), reshard_after_forward=reshards)
    whole, parted = (run_workers(split_unevenly, tmp_path, splits, options, world_size=2) for splits in (1, 3))
    for of_whole, of_parts in zip(whole, parted, strict=True):
        assert of_parts[0] == pytest.approx(of_whole[0], abs=1e-5)
        assert of_parts[1] == pytest.approx(of_whole[1], rel=1e-4)
    assert [sizes for *_, sizes in parted] == [[2] * 4 + [1, 1] * 4, [3] * 4 + [1, 2] * 4]


def split_unevenly(folder, splits: int, options: dict):
    return train_split(folder, splits, {}, **options)


def bytes_sent(folder, options: dict, accumulation: int):
    """By a step of the last phase."""
    sdp = dict(coverage_schedule=["0:0.5", "0.5:1:splits=2"], **options)
    trainer = make_trainer(folder, sdp, dict(gradient_accumulation_steps=accumulation))
    trainer.train()
    return trainer.state.log_history[-2]["sdp/bytes_sent_per_step"]


@pytest.mark.parametrize(
    ("options", "accumulation"), [({}, 2), pytest.param(dict(reshard_after_forward=True), 1, marks=pytest.mark.long)]
)
def test_each_piece_is_reduced_at_once(tmp_path, options, accumulation):
    """Gradients that are not reduced yet are as large as all that is gathered. In an accumulation window the last
    micro-batch reduces, and the others keep what is gathered."""
    plan = make_plan(tiny_config(), SDPConfig(coverage=1.0), 2)
    step = sdp_step(tiny_config(), plan, 0, Workload(batch=1, sequence=16), pieces=2, **options)
    assert run_workers(bytes_sent, tmp_path, options, accumulation, world_size=2) == [step.bytes_sent] * 2


def pairs(folder):
    """Rows of a batch may belong together, as the two of a preference; it has no labels then."""
    trainer = make_trainer(folder, dict(coverage_schedule=["0:0.5", "0.5:1:splits=2"]), dict(label_names=["pairs"]))
    with pytest.raises(SDPConfigError, match=r"splits of a phase: a batch has none of the labels \['pairs'\]"):
        trainer.train()
    return trainer.state.global_step


def test_a_batch_whose_rows_may_belong_together_is_refused_in_the_first_step(tmp_path):
    assert run_workers(pairs, tmp_path, world_size=2) == [0, 0]


def train_stored(folder, from_pretrained: bool):
    """A model that comes sharded: its optimizer is made for parameters of several meshes, other ones on each worker."""
    sdp = SDPConfig(coverage_schedule=[(0.0, 2 / 3), (0.5, 1.0)])  # of three workers each holds two parts
    trainer = make_trainer(folder, None, dict(max_steps=4, optim="sgd", learning_rate=0.1, weight_decay=0.1))
    load = hf_sdp.from_pretrained if from_pretrained else patched
    model, callback = load(folder / "model", sdp).train(), hf_sdp.SDPCallback()
    trainer = Trainer(model, trainer.args, train_dataset=trainer.train_dataset, callbacks=[callback])
    trainer.train()
    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len({*trained}) == len(trained) == len([*model.parameters()])
    return losses_of(trainer.state.log_history)


def patched(folder, sdp: SDPConfig):
    return patch_model(AutoModelForCausalLM.from_pretrained(folder), sdp)


def test_a_model_that_comes_sharded_trains_as_a_patched_one(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    stored, made = (run_workers(train_stored, tmp_path, way, world_size=3) for way in (True, False))
    for mine, expected in zip(stored, made, strict=True):
        assert mine == pytest.approx(expected, abs=1e-5)


def too_short(folder):
    trainer = make_trainer(folder, dict(coverage_schedule=[(0.0, 0.5), (0.1, 1.0)]), dict(max_steps=2))
    with pytest.raises(SDPConfigError, match=r"of 2 training steps the phases get \[0, 2\]"):
        trainer.train()
    return trainer.state.global_step


def test_a_phase_without_a_step_is_an_error_before_training(tmp_path):
    assert run_workers(too_short, tmp_path, world_size=2) == [0, 0]


def without_its_callback(folder):
    trainer = make_trainer(folder, dict(coverage_schedule=GROWS))
    trainer.remove_callback(SDPCallback)
    with pytest.raises(SDPStateError, match="has a coverage_schedule that nobody follows.*SDPCallback"):
        trainer.train()
    return trainer.state.global_step


def test_a_trainer_that_would_stay_in_the_first_phase_is_an_error(tmp_path):
    assert run_workers(without_its_callback, tmp_path, world_size=2) == [0, 0]


def fail_at_the_boundary(folder):
    """Memory is short for the sixth tensor that goes to other workers: the host would begin anew with what is left."""
    trainer = make_trainer(folder, dict(coverage_schedule=GROWS), dict(auto_find_batch_size=True))
    moved, real_move = [], handover.move

    def move(*args):
        moved.append(args)
        if len(moved) == 6:
            raise RuntimeError("CUDA out of memory.")
        real_move(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handover, "move", move)
        with pytest.raises(SDPStateError, match=r"Phase 1 .* could not begin \(RuntimeError\).* newest checkpoint"):
            trainer.train()
    return trainer.state.global_step


def test_what_fails_at_a_boundary_is_no_new_beginning_with_half_of_the_weights(tmp_path):
    assert run_workers(fail_at_the_boundary, tmp_path, world_size=2) == [2, 2]
