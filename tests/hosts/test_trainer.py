"""The unmodified Trainer with real workers."""

import math

import pytest

from hf_sdp import SDPCallback, SDPConfig, SDPConfigError, patch_model
from hf_sdp.engine.sharded import find_sharded
from tests.support.models import tiny_model
from tests.support.trainer import ARGUMENTS, losses_of, make_trainer, norms_of, train
from tests.support.workers import run_workers


def test_full_coverage_equals_ddp(tmp_path):
    arguments = dict(max_steps=20, learning_rate=3e-3)
    ddp = run_workers(train, tmp_path, None, arguments)
    for sharding in ("full", "none"):
        sdp = run_workers(train, tmp_path, dict(coverage=1.0, sharding=sharding), arguments)
        assert losses_of(sdp[0][2]) == pytest.approx(losses_of(ddp[0][2]), abs=1e-5)
        assert norms_of(sdp[0][2]) == pytest.approx(norms_of(ddp[0][2]), rel=1e-4)
        assert sdp[0][1] == pytest.approx(ddp[0][1], abs=1e-5)


@pytest.mark.parametrize("average", [True, pytest.param(False, marks=pytest.mark.long)])
def test_token_counts_that_differ_between_workers_weigh_as_in_ddp(tmp_path, average):
    """The Trainer multiplies the loss by the number of processes when it averages tokens across devices."""
    arguments = dict(max_steps=6, average_tokens_across_devices=average)
    ddp = run_workers(train, tmp_path, None, arguments, None, True)
    sdp = run_workers(train, tmp_path, dict(coverage=1.0), arguments, None, True)
    assert losses_of(sdp[0][2]) == pytest.approx(losses_of(ddp[0][2]), abs=1e-5)
    assert norms_of(sdp[0][2]) == pytest.approx(norms_of(ddp[0][2]), rel=1e-4)


SUBNETWORKS = {
    "neuron": dict(level="neuron"),
    "block": dict(level="block"),
    "parts": dict(level="neuron", coverage=0.75),
    "backward": dict(level="neuron", masking="backward"),
}


@pytest.mark.parametrize(
    ("variant", "subnetwork"),
    [
        ("gradient_checkpointing", "parts"),
        *(pytest.param("gradient_checkpointing", s, marks=pytest.mark.long) for s in ("backward", "neuron", "block")),
        ("bf16", "parts"),
        pytest.param("bf16", "backward", marks=pytest.mark.long),
        pytest.param("torch_compile", "neuron", marks=pytest.mark.long),  # a minute: one is enough
    ],
)
def test_training_variants_keep_the_losses(tmp_path, variant, subnetwork):
    sdp = SUBNETWORKS[subnetwork]
    options = {
        "gradient_checkpointing": dict(gradient_checkpointing=True),
        "bf16": dict(bf16=True),
        "torch_compile": dict(torch_compile=True, torch_compile_backend="aot_eager"),
    }[variant]
    plain, varied = (run_workers(train, tmp_path, sdp, arguments, timeout_s=280) for arguments in ({}, options))
    tolerance = 2e-2 if variant == "bf16" else 1e-5
    assert losses_of(varied[0][2]) == pytest.approx(losses_of(plain[0][2]), abs=tolerance)
    assert norms_of(varied[0][2]) == pytest.approx(norms_of(plain[0][2]), rel=0.1 if variant == "bf16" else 1e-4)
    assert varied[0][1] == pytest.approx(plain[0][1], abs=tolerance)
    if variant == "bf16":
        assert varied[0][1] != plain[0][1]  # it was really on


def checkpoint_parts(folder):
    trainer = make_trainer(
        folder, dict(coverage=[0.75, 0.5, 0.5, 0.25], reshard_after_forward=True), dict(gradient_checkpointing=True)
    )
    with pytest.raises(SDPConfigError, match="would hang"):
        trainer.train()


def test_recomputing_parts_that_are_gathered_twice_is_an_error_not_a_hang(tmp_path):
    run_workers(checkpoint_parts, tmp_path)


def log_everything(folder, arguments, profile_memory):
    trainer = make_trainer(folder, dict(), arguments)
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SDPCallback))
    callback.profile_memory = profile_memory
    trainer.train()
    return trainer.state.log_history


def test_what_is_logged(tmp_path):
    from hf_sdp import make_plan
    from tests.support.models import tiny_config

    histories = run_workers(log_everything, tmp_path, dict(max_steps=4), True)
    logged = [entry for entry in histories[0] if "loss" in entry]
    assert sum("sdp/state_bytes_max" in entry for entry in logged) == 1
    last = {key: value for entry in logged for key, value in entry.items()}
    full = make_plan(tiny_config(), SDPConfig(), 4).full_numel * 4
    assert last["sdp/state_bytes_max"] == last["sdp/state_bytes_min"] == 4 * full // 4
    assert last["sdp/state_bytes_parameters_max"] == full // 4
    assert last["sdp/state_bytes_optimizer_min"] == 2 * full // 4
    assert last["sdp/bytes_sent_per_step"] > 0 and last["sdp/step_time_s"] > 0
    assert last["sdp/peak_bytes"] > 3 * full // 4 and math.isfinite(last["grad_norm"])
    assert all(norms_of(h) == norms_of(histories[0]) for h in histories)


def test_memory_is_profiled_only_where_it_is_asked_for(tmp_path):
    history = run_workers(log_everything, tmp_path, dict(max_steps=4), False, world_size=2)[0]
    assert any("sdp/step_time_s" in entry for entry in history)
    assert not any("sdp/peak_bytes" in entry for entry in history)


def test_label_smoothing_shifts_labels_as_without_sdp(tmp_path):
    """FSDP2 renames the class, and the Trainer decides by name whether labels are shifted."""
    arguments = dict(label_smoothing_factor=0.1, max_steps=3)
    ddp, sdp = (run_workers(train, tmp_path, s, arguments)[0] for s in (None, dict(coverage=1.0)))
    assert losses_of(sdp[2]) == pytest.approx(losses_of(ddp[2]), abs=1e-5)


def test_a_short_last_window_equals_ddp(tmp_path):
    """64 rows on 4 workers in batches of 2, accumulated over 3: the last window of an epoch has 2 micro-batches."""
    arguments = dict(gradient_accumulation_steps=3, max_steps=-1, num_train_epochs=2)
    ddp, sdp = (run_workers(train, tmp_path, s, arguments)[0] for s in (None, dict(coverage=1.0)))
    assert len(losses_of(sdp[2])) == 6
    assert losses_of(sdp[2]) == pytest.approx(losses_of(ddp[2]), abs=1e-5)


def run_out_of_memory(folder):
    trainer = make_trainer(folder, dict(), dict(auto_find_batch_size=True, max_steps=3))
    failed = []

    def fail_once(module, args):
        if module.training and len(failed) < 1:
            failed.append(1)
            raise RuntimeError("CUDA out of memory.")

    trainer.model.model.layers[2].register_forward_pre_hook(fail_once)
    trainer.train()
    from hf_sdp import verify

    verify(trainer.model)
    return trainer.args.per_device_train_batch_size, losses_of(trainer.state.log_history)


def test_a_step_that_runs_out_of_memory_is_tried_again(tmp_path):
    results = run_workers(run_out_of_memory, tmp_path)
    assert all(len(losses) == 3 and losses == results[0][1] for _, losses in results)


def misuse(folder):
    import os

    from hf_sdp import SDPAccelerator

    messages = []

    def expect(error, function):
        with pytest.raises(error) as raised:
            function()
        messages.append(str(raised.value))

    expect(SDPConfigError, lambda: SDPAccelerator().prepare(tiny_model()))
    os.environ["WORLD_SIZE"] = "2"
    expect(SDPConfigError, lambda: patch_model(tiny_model(), SDPConfig()))
    os.environ["WORLD_SIZE"] = "4"
    patched = patch_model(tiny_model(), SDPConfig())
    expect(SDPConfigError, lambda: SDPAccelerator(sdp_config=SDPConfig(level="block")).prepare(patched))
    accelerator = SDPAccelerator()
    accelerator.state.distributed_type = __import__("accelerate").utils.DistributedType.FSDP
    expect(SDPConfigError, lambda: accelerator.prepare(patched))
    expect(SDPConfigError, lambda: patch_model(tiny_model(), SDPConfig(), rank=0, world_size=8))
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(output_dir=str(folder), **ARGUMENTS)
    expect(SDPConfigError, lambda: Trainer(model=tiny_model(), args=args, callbacks=[SDPCallback()]))
    assert find_sharded(patched) is None
    return messages


def test_misuse_is_a_clear_error_on_every_rank(tmp_path):
    results = run_workers(misuse, tmp_path)
    assert all([m[:40] for m in r] == [m[:40] for m in results[0]] for r in results)
    said = ["is not patched", "WORLD_SIZE=2", "was patched with", "FSDP is configured", "contradict", "is not patched"]
    for message, expected in zip(results[0], said, strict=True):
        assert expected in message


def plain_after_enable(folder):
    """enable() is for the whole process: a model that is not patched trains as ever."""
    import hf_sdp

    hf_sdp.enable()
    trainer = make_trainer(folder, None)
    trainer.train()
    return type(trainer.model_wrapped).__name__, losses_of(trainer.state.log_history)


def test_a_plain_model_after_enable_is_plain_ddp(tmp_path):
    results = run_workers(plain_after_enable, tmp_path)
    assert results[0][0] == "DistributedDataParallel"
    assert losses_of(run_workers(train, tmp_path, None)[0][2]) == results[0][1]


def simulate_with_a_wrong_window(folder):
    trainer = make_trainer(folder, dict(simulate=4), dict(gradient_accumulation_steps=3))
    with pytest.raises(SDPConfigError, match="gradient_accumulation_steps=3 must be a multiple of simulate=4"):
        trainer.train()


@pytest.mark.long
def test_virtual_workers_under_the_plain_trainer_are_the_real_ones(tmp_path):
    for sdp in (dict(), dict(level="block"), dict(masking="backward")):
        # Ragged rows: micro-batches have different numbers of tokens.
        real = run_workers(train, tmp_path, sdp, dict(gradient_accumulation_steps=1), None, True)
        simulated = run_workers(
            train, tmp_path, {**sdp, "simulate": 4}, dict(gradient_accumulation_steps=4), None, True, world_size=1
        )
        assert losses_of(simulated[0][2]) == pytest.approx(losses_of(real[0][2]), abs=1e-4)
        assert norms_of(simulated[0][2]) == pytest.approx(norms_of(real[0][2]), rel=1e-3)
        assert simulated[0][1] == pytest.approx(real[0][1], abs=1e-4)
    run_workers(simulate_with_a_wrong_window, tmp_path, world_size=1)
