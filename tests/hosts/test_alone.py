"""What one worker does alone, and a worker that fails: an error that says who is where."""

import re
import time

import pytest
import torch.distributed as dist
from transformers import TrainerCallback

from hf_sdp import SDPStateError, consolidate, export_subnetwork, verify
from hf_sdp.bench.workers import launch
from hf_sdp.engine.consolidate import full_tensors
from tests.support.trainer import Rows, losses_of, make_trainer
from tests.support.training import prepared
from tests.support.workers import run_workers


class Alone(TrainerCallback):
    """Rank 0 does everything in the first step that only all workers can do together."""

    def __init__(self, folder):
        self.folder, self.said = folder, {}

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step != 1 or not state.is_world_process_zero:
            return
        ids = Rows(1).ids[:, :4]
        model.eval()
        for name, call in {
            "a forward in eval mode": lambda: model.generate(ids, max_new_tokens=2, synced_gpus=True),
            "evaluate": self.trainer.evaluate,
            "predict": lambda: self.trainer.predict(Rows(4)),
            "save_pretrained": lambda: self.trainer.save_model(f"{self.folder}/out"),
            "logging the loss": lambda: self.trainer.log({"loss": 1.0}),
            "verify": lambda: verify(model),
            "export_subnetwork": lambda: export_subnetwork(model, f"{self.folder}/out"),
            "putting together the full model": lambda: consolidate(model),
        }.items():
            with pytest.raises(SDPStateError) as raised:
                call()
            self.said[name] = str(raised.value)


def rank_0_alone(folder, logging_steps: int):
    # 100 s: that the others have gone on is told at once.
    trainer = make_trainer(folder, dict(evaluation_timeout_s=100.0), dict(max_steps=2, logging_steps=logging_steps))
    trainer.add_callback(alone := Alone(folder))
    alone.trainer = trainer
    trainer.train()
    trainer.evaluate()  # and all are in step again
    return alone.said, losses_of(trainer.state.log_history)


@pytest.mark.parametrize(("logging_steps", "next_thing"), [(1, "logging"), (2, "accelerator.gather")])
def test_what_rank_0_does_alone_is_an_error_there_and_training_goes_on(tmp_path, logging_steps, next_thing):
    results = run_workers(rank_0_alone, tmp_path, logging_steps)
    assert len(results[0][0]) == 8
    for what, said in results[0][0].items():
        assert re.search(rf"Rank 0: {what} is a collective, but rank [123] has gone on to {next_thing}\b", said), said
    assert all(losses == results[0][1] for _, losses in results)


def save_first(folder):
    from tests.support.models import tiny_model

    trainer = make_trainer(folder, dict(), dict(max_steps=2))
    trainer.save_model(f"{folder}/first")
    trainer.accelerator.prepare(trainer.model)
    trainer.accelerator.free_memory()  # before it has run
    trainer.train()
    plain = make_trainer(folder, dict(), dict(max_steps=2))
    plain.train()
    assert losses_of(trainer.state.log_history) == losses_of(plain.state.log_history)
    return {name: tensor.sum().item() for name, tensor in tiny_model(seed=0).state_dict().items()}


def test_a_model_is_saved_before_it_trains(tmp_path):
    from safetensors.torch import load_file

    first = run_workers(save_first, tmp_path)[0]
    assert {n: t.sum().item() for n, t in load_file(tmp_path / "first" / "model.safetensors").items()} == first


def other_arguments(folder):
    trainer = make_trainer(folder, dict(), dict(logging_steps=1 + (dist.get_rank() == 3)))
    with pytest.raises(ValueError, match="TrainingArguments: logging_steps=1 on rank 0, logging_steps=2 on rank 3"):
        trainer.train()


def test_arguments_that_differ_are_an_error_on_every_rank(tmp_path):
    run_workers(other_arguments, tmp_path)


ODD = 1


def fail(folder, where: str):
    """Rank ODD fails, and its process ends: the function catches what it raises and returns."""

    class Failing(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if where == "callback" and state.global_step == 2 and dist.get_rank() == ODD:
                raise KeyError("a callback of mine")

    batches = []

    def collate(rows):
        from transformers import default_data_collator

        batches.append(1)
        if where == "collator" and dist.get_rank() == ODD and len(batches) == 3:
            raise KeyError("a collator of mine")
        return default_data_collator(rows)

    def compute_metrics(prediction):
        if dist.get_rank() == ODD:
            raise KeyError("a metric of mine")
        return {"constant": 1.0}

    arguments = dict(max_steps=4, eval_strategy="steps", eval_steps=1) if where == "metric" else dict(max_steps=4)
    trainer = make_trainer(
        folder, dict(), arguments, callbacks=[Failing()], data_collator=collate, compute_metrics=compute_metrics
    )
    try:
        trainer.train()
    except Exception as error:
        return type(error).__name__, str(error)


@pytest.mark.parametrize("where", ["callback", "collator", "metric"])
def test_an_error_on_one_worker_is_told_by_the_others(tmp_path, where):
    results = launch(fail, 2, str(tmp_path), where, timeout_s=60)
    assert results[ODD] == ("KeyError", f"'a {where} of mine'")
    kind, said = results[0]
    assert kind == "SDPStateError" and f"rank 1 has failed with KeyError: 'a {where} of mine'" in said, said


def write_slowly():
    """Rank 0 looks, at each tensor, how far the others have come.

    Nothing is exchanged, as if on NCCL, where a worker asks for a collective and goes on; gloo waits in it.
    """
    from hf_sdp.compat import default_store

    _, model, _ = prepared(dict())
    store, rank, ahead = dist.PrefixStore("write_slowly", default_store()), dist.get_rank(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_sdp.engine.consolidate.exchange", lambda *args: None)
        for number, _ in enumerate(full_tensors(model)):
            store.set(str(rank), str(number))
            if rank == 0:
                if number == 0:
                    time.sleep(1)  # a slow disk
                reached = [int(store.get(str(other))) if store.check([str(other)]) else 0 for other in (1, 2, 3)]
                ahead = max(ahead, *(r - number for r in reached))
    return ahead, number


def test_nobody_is_far_ahead_of_rank_0_while_it_writes():
    ahead, last = run_workers(write_slowly)[0]
    assert 0 < ahead <= 4 < last
