"""When gradients are accumulated, and when synchronized (as test_sync.py of Accelerate).

That one compares the gradients of a dense model of one process. Here a window is compared with one batch of the same
rows: what holds whoever has which parameter.
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from tiny import evaluate_and_save, llama, loader_of, loss_of, token_rows
from transformers import AutoModelForCausalLM


def prepared(accelerator: Accelerator):
    set_seed(42)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lr_lambda=lambda step: 0.9**step)
    return accelerator.prepare(model, optimizer, schedule, loader_of(token_rows(32), batch_size=4))


def norm_everywhere(accelerator: Accelerator, model) -> float:
    """Of the gradients, which must have been synchronized."""
    norm = accelerator.clip_grad_norm_(model.parameters(), 1e9)
    of_all = accelerator.gather(torch.as_tensor(float(norm))[None]).tolist()
    assert len(set(of_all)) == 1 and of_all[0] > 0, of_all
    return of_all[0]


def halves(batch: dict) -> list[dict]:
    return [{name: values[part::2] for name, values in batch.items()} for part in (0, 1)]


def assert_close(one: float, other: float) -> None:
    assert abs(one - other) < 1e-4 * other, (one, other)


def check_no_sync(accelerator: Accelerator) -> None:
    """One micro-batch under ``no_sync``, then one that synchronizes both."""
    model, optimizer, _, loader = prepared(accelerator)
    for batch in loader:
        first, second = halves(batch)
        with accelerator.no_sync(model):
            accelerator.backward(model(**first).loss / 2)
        accelerator.backward(model(**second).loss / 2)
        norm = norm_everywhere(accelerator, model)
        optimizer.zero_grad()
        accelerator.backward(model(**batch).loss)
        assert_close(norm, norm_everywhere(accelerator, model))
        optimizer.step()
        optimizer.zero_grad()


def check_several_forwards(accelerator: Accelerator) -> None:
    """All forwards first, under ``no_sync``, then all backwards, of which the last one synchronizes."""
    model, optimizer, _, loader = prepared(accelerator)
    batch = next(iter(loader))
    losses = []
    for half in halves(batch):
        with accelerator.no_sync(model):
            losses.append(model(**half).loss / 2)
    accelerator.backward(losses[0])
    with accelerator.trigger_sync_in_backward(model):
        accelerator.backward(losses[1])
    norm = norm_everywhere(accelerator, model)
    optimizer.zero_grad()
    accelerator.backward(model(**batch).loss)
    assert_close(norm, norm_everywhere(accelerator, model))


def check_accumulate(split_batches: bool, dispatch_batches: bool, sync_each_batch: bool) -> list[float]:
    """Losses and norms of windows of two batches. Weights, and the learning rate, change at their ends."""
    accelerator = Accelerator(
        dataloader_config=DataLoaderConfiguration(split_batches=split_batches, dispatch_batches=dispatch_batches),
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=2, sync_each_batch=sync_each_batch),
    )
    model, optimizer, schedule, loader = prepared(accelerator)
    rows = {name: values[:2] for name, values in next(iter(loader)).items()}
    norms, losses, num_steps = [], [], 0
    with torch.no_grad():
        before = model(**rows).loss.item()
    for number, batch in enumerate(loader, 1):
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            losses.append(loss.item())
            accelerator.backward(loss)
            is_end = number % 2 == 0 or number == len(loader)
            assert accelerator.sync_gradients == is_end
            if is_end:
                norms.append(norm_everywhere(accelerator, model))
                num_steps += 1
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        with torch.no_grad():
            after = model(**rows).loss.item()
        assert (after != before) == is_end, (number, before, after)
        before = after
        stepped = num_steps * (1 if split_batches else accelerator.num_processes)
        assert abs(schedule.get_last_lr()[0] - 1e-2 * 0.9**stepped) < 1e-9
    GradientState._reset_state()
    return [*losses, *norms]


def check_dataloader_break(accelerator: Accelerator) -> None:
    """Another loader is read within a loop, and the state knows which one is at its end."""
    first, second = accelerator.prepare(
        loader_of(token_rows(32), batch_size=2), loader_of(token_rows(16), batch_size=2)
    )
    state = accelerator.gradient_state
    assert state.active_dataloader is None
    for number, _ in enumerate(first, 1):
        assert state.active_dataloader is first and state.end_of_dataloader == (number == len(first))
        if number == 1:
            for inner, _ in enumerate(second, 1):
                assert state.active_dataloader is second and state.end_of_dataloader == (inner == len(second))
    assert state.active_dataloader is None


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path)
    args = parser.parse_args()
    for check in (check_dataloader_break, check_no_sync, check_several_forwards):
        check(Accelerator())
    for rank_0_reads in (False, True):
        found = [check_accumulate(rank_0_reads, rank_0_reads, sync_each_batch=each) for each in (True, False)]
        for one, other in zip(*found, strict=True):
            assert_close(one, other)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model, optimizer, _, loader = prepared(accelerator)
    losses = []
    for _ in range(4):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                losses.append(loss.item())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    eval_loader = accelerator.prepare(loader_of(token_rows(8, seed=1), batch_size=2))
    evaluate_and_save(accelerator, model, eval_loader, losses, args.output_dir)
    accelerator.end_training()


if __name__ == "__main__":
    if sys.argv[1] == "--reloaded":
        print("reloaded", loss_of(AutoModelForCausalLM.from_pretrained(sys.argv[2]), token_rows(8, seed=1)))
    else:
        main()
