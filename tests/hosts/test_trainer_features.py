"""Features of the Trainer with SDP: as DDP is where everything is held, and as the saved model is where it is not."""

import copy
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_sdp import SDPCallback, SDPStateError
from tests.support.trainer import Rows, losses_of, make_trainer, norms_of
from tests.support.workers import run_workers

HALF = dict(coverage=0.5)
SHORT = dict(max_steps=2, per_device_eval_batch_size=2)


class Stream(torch.utils.data.IterableDataset):
    """Rows one after the other; how many is not known."""

    def __init__(self, num_rows: int):
        self.rows = Rows(num_rows)

    def __iter__(self):
        return (self.rows[i] for i in range(len(self.rows)))


class Masked(Rows):
    """Rows of different length, with their attention mask."""

    def __getitem__(self, i):
        return {**super().__getitem__(i), "attention_mask": (self.labels[i] != -100).long()}


def streamed(num_rows: int):
    import datasets

    rows = Rows(num_rows)
    columns = {"input_ids": rows.ids.tolist(), "labels": rows.labels.tolist()}
    return datasets.Dataset.from_dict(columns).to_iterable_dataset(num_shards=2)


def short_and_long(num_rows: int) -> list[dict]:
    rows, lengths = Rows(num_rows), [4 + i % 12 for i in range(num_rows)]
    return [{"input_ids": rows.ids[i, :n], "labels": rows.labels[i, :n]} for i, n in enumerate(lengths)]


def padded(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    return {
        "input_ids": pad_sequence(ids, batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def steep(outputs, labels, num_items_in_batch=None):
    """A loss of one's own, of the logits."""
    losses = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none") ** 1.5
    return losses.sum() / (losses.numel() if num_items_in_batch is None else num_items_in_batch)


class OwnLoss(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = steep(outputs, inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss


class Average(TrainerCallback):
    """Reads the weights after each step, and swaps their average in at the end, as callbacks for EMA do."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.average = [p.detach().clone() for p in model.parameters()]

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for average, p in zip(self.average, model.parameters(), strict=True):
            average.lerp_(p.detach(), 0.5)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            for average, p in zip(self.average, model.parameters(), strict=True):
                p.copy_(average)


@dataclass(frozen=True)
class Feature:
    """Arguments and options of a Trainer, its rows for training, and its class."""

    arguments: dict = field(default_factory=dict)
    options: dict = field(default_factory=dict)
    rows: tuple = (Rows, 64)
    trainer: type = Trainer


EACH_BATCH = dict(gradient_accumulation_kwargs=dict(sync_each_batch=True))
FEATURES = {
    "sync_each_batch": Feature(dict(accelerator_config=EACH_BATCH)),
    "tokens_seen": Feature(dict(include_num_input_tokens_seen="non_padding"), rows=(Masked, 64, 0, True)),
    "group_by_length": Feature(
        dict(train_sampling_strategy="group_by_length"), dict(data_collator=padded), (short_and_long, 64)
    ),
    "iterable": Feature(rows=(Stream, 11)),
    "iterable_of_each_worker": Feature(dict(accelerator_config=dict(dispatch_batches=False)), rows=(Stream, 11)),
    "streaming": Feature(rows=(streamed, 27)),
    "last_batches": Feature(dict(max_steps=-1, num_train_epochs=2), rows=(Rows, 13)),
    "neftune": Feature(dict(neftune_noise_alpha=5.0)),
    "compute_loss": Feature(trainer=OwnLoss),
    "compute_loss_func": Feature(options=dict(compute_loss_func=steep)),
    "averaged_weights": Feature(options=dict(callbacks=[Average()])),
    "save_only_model": Feature(dict(save_strategy="steps", save_steps=2, save_only_model=True)),
}


def trainer_of(folder, feature: Feature, sdp: dict | None):
    arguments = copy.deepcopy({**SHORT, **feature.arguments})  # the host writes into accelerator_config
    trainer = make_trainer(folder, sdp, arguments, **feature.options)
    trainer.__class__ = feature.trainer
    make, *arguments = feature.rows
    trainer.train_dataset, trainer.eval_dataset = make(*arguments), Rows(7, seed=1)  # on 2 workers: a short last batch
    return trainer


def train_with(folder, name: str, sdp: dict | None):
    """What is logged, the loss in evaluation, and what is predicted."""
    trainer = trainer_of(folder, FEATURES[name], sdp)
    trainer.train()
    trainer.save_model(f"{folder}/saved")
    losses, norms = losses_of(trainer.state.log_history), norms_of(trainer.state.log_history)
    return losses, norms, trainer.state.num_input_tokens_seen, *evaluate(trainer)


def evaluate(trainer):
    return trainer.evaluate()["eval_loss"], torch.from_numpy(trainer.predict(Rows(5, seed=2)).predictions)


def compare(folder, name: str):
    """DDP, all held, half held, and what the last one has saved, without SDP."""
    ddp, whole, half = (
        train_with(f"{folder}/{kind}", name, sdp)
        for kind, sdp in {"ddp": None, "whole": dict(coverage=1.0), "half": HALF}.items()
    )
    dist.barrier()  # rank 0 has saved
    plain = trainer_of(f"{folder}/plain", FEATURES[name], None)
    saved = "checkpoint-2" if FEATURES[name].arguments.get("save_only_model") else "saved"
    plain.model = AutoModelForCausalLM.from_pretrained(f"{folder}/half/{saved}")
    return ddp, whole, half, evaluate(plain)


@pytest.mark.long
@pytest.mark.parametrize("name", FEATURES)
def test_a_feature_is_as_under_ddp_and_evaluates_what_it_saves(tmp_path, name):
    for ddp, whole, half, plain in run_workers(compare, tmp_path, name, world_size=2):
        (losses, norms, tokens, loss, predicted), (ddp_losses, ddp_norms, ddp_tokens, ddp_loss, _) = whole, ddp
        assert losses == pytest.approx(ddp_losses, abs=1e-5) and norms == pytest.approx(ddp_norms, rel=1e-4)
        assert loss == pytest.approx(ddp_loss, abs=1e-5)
        assert tokens == ddp_tokens == half[2] and (tokens > 0) == (name == "tokens_seen")
        assert half[0] != pytest.approx(losses, abs=1e-4)
        assert half[3] == pytest.approx(plain[0], abs=1e-6)
        assert predicted.shape == (5, 16, 64)
        torch.testing.assert_close(half[4], plain[1], rtol=0, atol=1e-6)


def train_again(folder, sdp: dict | None, same: bool):
    """Twice with the same Trainer, or with a second one."""
    first = make_trainer(folder, sdp, SHORT)
    first.train()
    last = first
    if not same:
        callbacks = [] if sdp is None else [SDPCallback()]
        last = Trainer(
            first.model, first.args, train_dataset=Rows(64), eval_dataset=first.eval_dataset, callbacks=callbacks
        )
    if sdp is not None:  # the host does not go on with DDP after an evaluation
        assert last.evaluate()["eval_loss"] == first.evaluate()["eval_loss"]
    last.train()
    return losses_of(last.state.log_history), norms_of(last.state.log_history), last.evaluate()["eval_loss"]


def train_both_again(folder, same: bool):
    return train_again(folder, None, same), train_again(folder, dict(coverage=1.0), same)


@pytest.mark.long
@pytest.mark.parametrize("same", [True, False], ids=["the same trainer", "a second trainer"])
def test_training_goes_on_with_the_same_model(tmp_path, same):
    for (losses, norms, loss), sdp in run_workers(train_both_again, tmp_path, same, world_size=2):
        assert sdp[0] == pytest.approx(losses, abs=1e-5) and sdp[1] == pytest.approx(norms, rel=1e-4)
        assert sdp[2] == pytest.approx(loss, abs=1e-5)


def end_unevenly(folder):
    """13 rows in batches of 2: rank 0 has four batches, and rank 1 three."""
    arguments = dict(max_steps=-1, num_train_epochs=1, accelerator_config=dict(even_batches=False))
    trainer = make_trainer(folder, dict(evaluation_timeout_s=5.0), arguments)
    trainer.train_dataset = Rows(13)
    with pytest.raises(SDPStateError) as raised:
        trainer.train()
    return str(raised.value)


@pytest.mark.long
def test_workers_with_different_numbers_of_batches_are_an_error_that_says_so(tmp_path):
    for said in run_workers(end_unevenly, tmp_path, world_size=2):
        assert "it has more batches. Give every worker as many" in said, said
