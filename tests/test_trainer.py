"""The unmodified Trainer with real workers."""

import json
import math
import re
import time
from pathlib import Path

import pytest
import torch
from models import VOCAB, tiny_model
from workers import run_workers

from hf_sdp import SDPCallback, SDPConfig, SDPConfigError, SDPStateError, patch_model

ARGUMENTS = dict(
    per_device_train_batch_size=2, per_device_eval_batch_size=3, max_steps=4, gradient_accumulation_steps=2,
    max_grad_norm=0.5, learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
    use_cpu=True, seed=0, lr_scheduler_type="constant",
)  # fmt: skip


class Rows(torch.utils.data.Dataset):
    """Rows of random tokens; rows of different length (padded, ignored) when ``ragged``."""

    def __init__(self, num_rows: int, seed: int = 0, ragged: bool = False):
        g = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(0, VOCAB, (num_rows, 16), generator=g)
        self.labels = self.ids.clone()
        if ragged:
            for row, length in enumerate(torch.randint(4, 17, (num_rows,), generator=g).tolist()):
                self.labels[row, length:] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def make_trainer(
    folder, sdp: dict | None, arguments: dict | None = None, model: dict | None = None, ragged=False, **kwargs
):
    from transformers import Trainer, TrainingArguments

    args = TrainingArguments(output_dir=str(folder), **{**ARGUMENTS, **(arguments or {})})
    net = tiny_model(seed=0 if sdp is None else args.process_index, **(model or {}))
    if sdp is not None:
        net = patch_model(net, SDPConfig(**sdp))
        kwargs["callbacks"] = [*kwargs.get("callbacks", []), SDPCallback()]
    return Trainer(model=net, args=args, train_dataset=Rows(64, ragged=ragged), eval_dataset=Rows(24, seed=1), **kwargs)


def train(folder, sdp, arguments=None, model=None, ragged=False):
    trainer = make_trainer(folder, sdp, arguments, model, ragged)
    result = trainer.train()
    return result.training_loss, trainer.evaluate()["eval_loss"], trainer.state.log_history


def losses_of(log_history) -> list[float]:
    return [entry["loss"] for entry in log_history if "loss" in entry]


def norms_of(log_history) -> list[float]:
    return [entry["grad_norm"] for entry in log_history if "grad_norm" in entry]


def train_and_save(folder, sdp, arguments=None, model=None):
    trainer = make_trainer(folder, sdp, arguments, model)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.save_model(f"{folder}/out")
    return metrics["eval_loss"], norms_of(trainer.state.log_history)


def full_loss(folder) -> float:
    """Evaluation loss of a checkpoint in plain transformers, one process, as the Trainer averages it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    rows = Rows(24, seed=1)
    with torch.no_grad():
        losses = [
            model(input_ids=rows.ids[i : i + 1], labels=rows.ids[i : i + 1]).loss.item() for i in range(len(rows))
        ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("masking", ["forward", "backward"])
@pytest.mark.parametrize("level", ["neuron", "block"])
def test_evaluation_is_of_the_full_model_and_the_checkpoint_is_standard(tmp_path, level, masking):
    results = run_workers(
        train_and_save, tmp_path, dict(level=level, masking=masking, coverage=0.5), None, {"tie_word_embeddings": True}
    )
    assert len({json.dumps(r) for r in results}) == 1  # loss and norms are the same on every rank
    assert results[0][0] == pytest.approx(full_loss(tmp_path / "out"), abs=1e-6)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == ["model.safetensors"]
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as f:
        assert set(f.keys()) == {n for n, _ in tiny_model(tie_word_embeddings=True).named_parameters()}  # tied: once
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]


def test_full_coverage_equals_ddp(tmp_path):
    arguments = dict(max_steps=20, learning_rate=3e-3)
    ddp = run_workers(train, tmp_path, None, arguments)
    for sharding in ("full", "none"):
        sdp = run_workers(train, tmp_path, dict(coverage=1.0, sharding=sharding), arguments)
        assert losses_of(sdp[0][2]) == pytest.approx(losses_of(ddp[0][2]), abs=1e-5)
        assert norms_of(sdp[0][2]) == pytest.approx(norms_of(ddp[0][2]), rel=1e-4)
        assert sdp[0][1] == pytest.approx(ddp[0][1], abs=1e-5)


@pytest.mark.parametrize("average", [True, False])
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
        *(("gradient_checkpointing", s) for s in SUBNETWORKS),
        ("bf16", "parts"),
        ("bf16", "backward"),
        ("torch_compile", "neuron"),  # a minute: one is enough
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


def save_everywhere(folder):
    """All the ways to save, and what they must leave behind."""
    from safetensors.torch import load_file
    from transformers import TrainerCallback

    from hf_sdp import consolidate

    arguments = dict(
        max_steps=6, gradient_accumulation_steps=1, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2,
        load_best_model_at_end=True, metric_for_best_model="loss", save_total_limit=1, learning_rate=3e-1,
    )  # fmt: skip

    class LateSave(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_save = state.global_step == 5 or control.should_save

    trainer = make_trainer(folder, dict(), arguments)
    trainer.add_callback(LateSave())
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    weights = consolidate(trainer.model)
    if trainer.is_world_process_zero():
        assert all(torch.equal(best[n], weights[n]) for n in best)  # load_best took effect
        before = dict(trainer.model._sdp_state.saved_weights)
        trainer.save_model(f"{folder}/alone")  # rank 0 only, after training: must not hang
        assert trainer.model._sdp_state.saved_weights.keys() == before.keys()  # the host empties what it is given
    trainer.save_model(f"{folder}/all")
    trainer.model.save_pretrained(f"{folder}/direct")
    trainer.accelerator.save_model(trainer.model, f"{folder}/accelerator")
    trainer.model.save_pretrained(  # the way Accelerate's documentation saves
        f"{folder}/idiom",
        is_main_process=trainer.accelerator.is_main_process,
        save_function=trainer.accelerator.save,
        state_dict=trainer.accelerator.get_state_dict(trainer.model),
    )
    torch.distributed.barrier()
    for name in ("alone", "all", "direct", "accelerator", "idiom"):
        saved = load_file(f"{folder}/{name}/model.safetensors")
        assert saved.keys() == best.keys() and all(torch.equal(saved[n], best[n]) for n in best), name
    return trainer.state.best_metric, full_loss(f"{folder}/all")


def test_saving_by_steps_late_best_and_alone(tmp_path):
    for best_metric, loss in run_workers(save_everywhere, tmp_path):
        assert best_metric == pytest.approx(loss, abs=1e-5)


def evaluate_subnetworks(folder):
    trainer = make_trainer(folder, dict(evaluate="subnetwork"), dict(max_steps=1))
    trainer.train()
    return trainer.evaluate()


def test_the_metric_of_a_subnetwork_is_named_so(tmp_path):
    metrics = run_workers(evaluate_subnetworks, tmp_path)[0]
    assert "eval_subnetwork_loss" in metrics and "eval_loss" not in metrics


def evaluate_first(folder):
    """Evaluation before and after training, twice over: prepare and hooks must not be done twice."""
    trainer = make_trainer(folder, dict(), dict(max_steps=2, gradient_accumulation_steps=1, eval_on_start=True))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    first = trainer.model._sdp_state.version
    trainer.train()
    return before, first, trainer.model._sdp_state.version, trainer.state.log_history[0]


def test_evaluate_before_train_and_train_twice(tmp_path):
    for before, first, second, _ in run_workers(evaluate_first, tmp_path):
        assert before == pytest.approx(untrained_loss(), abs=1e-5)
        assert (first, second) == (2, 4)


def untrained_loss() -> float:
    rows, model = Rows(24, seed=1), tiny_model().eval()
    with torch.no_grad():
        return model(input_ids=rows.ids, labels=rows.ids).loss.item()


def log_everything(folder, arguments):
    trainer = make_trainer(folder, dict(), arguments)
    trainer.train()
    return trainer.state.log_history


def test_what_is_logged(tmp_path):
    from models import tiny_config

    from hf_sdp import make_plan

    histories = run_workers(log_everything, tmp_path, dict(max_steps=4))
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


def generate(folder):
    from hf_sdp import consolidate

    trainer = make_trainer(folder, dict(), dict(max_steps=1))
    trainer.train()
    model, ids = trainer.model.eval(), Rows(1).ids[:, :4]
    generated = model.generate(ids, max_new_tokens=5, do_sample=False, synced_gpus=True, pad_token_id=0)
    weights = consolidate(model)
    if weights is not None:
        plain = tiny_model().eval()
        plain.load_state_dict(weights)
        assert torch.equal(plain.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0), generated)
    return generated.tolist()


def test_generation_on_all_workers_is_that_of_the_full_model(tmp_path):
    results = run_workers(generate, tmp_path)
    assert all(r == results[0] for r in results)


def forward_on_rank_0_only(folder, others: str):
    trainer = make_trainer(folder, dict(evaluation_timeout_s=20 if others == "train" else 3), dict(max_steps=1))
    trainer.train()
    batch = trainer._prepare_inputs({"input_ids": Rows(1).ids, "labels": Rows(1).labels})
    began = time.monotonic()
    if trainer.is_world_process_zero():
        trainer.model.eval()
        with pytest.raises(SDPStateError, match="a forward in eval mode is a collective") as raised:
            trainer.model(**batch)
        trainer.model.train()
        message, seconds = str(raised.value), time.monotonic() - began
        if others == "train":
            trainer.model(**batch)  # the others wait here
        return message, seconds
    if others == "train":
        trainer.model.train()
        trainer.model(**batch)


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ("train", "has gone on to a forward in training mode"),
        ("nothing", r"ranks \[1, 2, 3\] have not come to it within 3 s"),
    ],
)
def test_a_forward_on_one_worker_only_is_an_error_there_within_seconds(tmp_path, others, message):
    said, seconds = run_workers(forward_on_rank_0_only, tmp_path, others)[0]
    assert re.search(message, said) and seconds < 10


def uneven_evaluation(folder):
    """Rank 0 has one batch more than the others, which go on to training."""
    trainer = make_trainer(folder, dict(), dict(max_steps=1))
    trainer.train()
    model, batch = trainer.model, trainer._prepare_inputs({"input_ids": Rows(1).ids, "labels": Rows(1).labels})
    model.eval()
    model(**batch)
    if trainer.is_world_process_zero():
        with pytest.raises(SDPStateError, match="has gone on to a forward in training mode"):
            model(**batch)
    model.train()
    loss = model(**batch).loss.item()
    trainer.state.global_step = 7
    trainer._save_checkpoint(model, None)  # after the error has been dealt with, all are in step again
    return loss


def test_uneven_evaluation_is_an_error_and_nobody_is_left_waiting(tmp_path):
    assert all(math.isfinite(loss) for loss in run_workers(uneven_evaluation, tmp_path))
    assert (tmp_path / "checkpoint-7").is_dir()


def evaluate_unevenly_alone(folder):
    """A subnetwork that a worker has whole: how often it is evaluated is nobody else's business."""
    trainer = make_trainer(folder, dict(evaluate="subnetwork", sharding="none"), dict(max_steps=1))
    trainer.train()
    batch = trainer._prepare_inputs({"input_ids": Rows(1).ids, "labels": Rows(1).labels})
    trainer.model.eval()
    for _ in range(trainer.args.process_index):
        trainer.model(**batch)
    trainer.state.global_step = 7
    trainer._save_checkpoint(trainer.model, None)


def test_a_forward_of_a_whole_subnetwork_is_local(tmp_path):
    run_workers(evaluate_unevenly_alone, tmp_path)
    assert (tmp_path / "checkpoint-7").is_dir()


def metrics_of_the_evaluate_library(folder):
    import datasets
    import evaluate

    class TokenAccuracy(evaluate.Metric):
        """Defined here: the library's own are downloaded."""

        def _info(self):
            features = datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            )
            return evaluate.MetricInfo(description="", citation="", features=features)

        def _compute(self, predictions, references):
            return {"accuracy": sum(p == r for p, r in zip(predictions, references, strict=True)) / len(references)}

    metric = TokenAccuracy(experiment_id=f"{Path(folder).name}-{torch.distributed.get_rank()}", cache_dir=str(folder))

    def compute(prediction):
        guesses = prediction.predictions[:, :-1].argmax(-1)
        return metric.compute(predictions=guesses.flatten(), references=prediction.label_ids[:, 1:].flatten())

    trainer = make_trainer(folder, dict(), dict(max_steps=2), compute_metrics=compute)
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]
    trainer.save_model(f"{folder}/out")
    return accuracy


def test_compute_metrics_sees_the_full_model(tmp_path):
    pytest.importorskip("evaluate")
    from transformers import AutoModelForCausalLM

    results = run_workers(metrics_of_the_evaluate_library, tmp_path)
    rows = Rows(24, seed=1).ids
    with torch.no_grad():
        guesses = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=rows).logits[:, :-1].argmax(-1)
    assert results == [pytest.approx((guesses == rows[:, 1:]).float().mean().item(), abs=1e-6)] * 4


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
    assert not patched._sdp_state.sharded
    return messages


def test_misuse_is_a_clear_error_on_every_rank(tmp_path):
    results = run_workers(misuse, tmp_path)
    assert all([m[:40] for m in r] == [m[:40] for m in results[0]] for r in results)
    for message, expected in zip(
        results[0], ["is not patched", "WORLD_SIZE=2", "was patched with", "FSDP is configured", "contradict", "is not patched"],
        strict=True,
    ):  # fmt: skip
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


def state_dict_on_one_worker(folder):
    """Anything on rank 0 may call state_dict() between an evaluation and the next step."""
    trainer = make_trainer(folder, dict(), dict(max_steps=1))
    trainer.train()
    trainer.evaluate()
    if trainer.is_world_process_zero():
        trainer.model.state_dict()
    trainer.model.train()
    return trainer.model(**trainer._prepare_inputs({"input_ids": Rows(1).ids, "labels": Rows(1).labels})).loss.item()


def test_a_state_dict_on_one_worker_does_not_disturb_the_others(tmp_path):
    assert all(math.isfinite(loss) for loss in run_workers(state_dict_on_one_worker, tmp_path))


def simulate_with_a_wrong_window(folder):
    trainer = make_trainer(folder, dict(simulate=4), dict(gradient_accumulation_steps=3))
    with pytest.raises(SDPConfigError, match="gradient_accumulation_steps=3 must be a multiple of simulate=4"):
        trainer.train()


def test_virtual_workers_under_the_plain_trainer_are_the_real_ones(tmp_path):
    for sdp in (dict(), dict(level="block"), dict(masking="backward")):
        real = run_workers(train, tmp_path, sdp, dict(gradient_accumulation_steps=1))
        simulated = run_workers(
            train, tmp_path, {**sdp, "simulate": 4}, dict(gradient_accumulation_steps=4), world_size=1
        )
        assert losses_of(simulated[0][2]) == pytest.approx(losses_of(real[0][2]), abs=1e-4)
        assert norms_of(simulated[0][2]) == pytest.approx(norms_of(real[0][2]), rel=1e-3)
        assert simulated[0][1] == pytest.approx(real[0][1], abs=1e-4)
    run_workers(simulate_with_a_wrong_window, tmp_path, world_size=1)
