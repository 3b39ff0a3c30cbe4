"""What Accelerate does between processes, beside a model that trains (as test_script.py and test_ops.py of Accelerate).

Those train a line with two parameters, and compare it with one of one process. Here two ways to the same batches are
compared: what holds whoever has which parameter.
"""

import argparse
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DataLoaderConfiguration, gather_object, set_seed, synchronize_rng_states
from accelerate.utils import operations as functions
from tiny import evaluate_and_save, llama, loader_of, loss_of, token_rows
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def check_processes(accelerator: Accelerator, folder: Path) -> None:
    file, rank, number = folder / "order.txt", accelerator.process_index, accelerator.num_processes
    with accelerator.main_process_first(), file.open("a") as opened:
        opened.write(f"{rank}\n")
    accelerator.wait_for_everyone()
    lines = file.read_text().split()
    assert lines[0] == "0" and sorted(map(int, lines)) == list(range(number))
    called: list[str] = []
    accelerator.on_main_process(called.append)("main")
    accelerator.on_local_main_process(called.append)("local main")
    accelerator.on_last_process(called.append)("last")
    accelerator.on_process(called.append, process_index=1)("one")
    is_called = {"main": rank == 0, "local main": rank == 0, "last": rank == number - 1, "one": rank == 1}
    assert called == [name for name, expected in is_called.items() if expected]


def check_splitting(accelerator: Accelerator) -> None:
    number = accelerator.num_processes
    for things in (list(range(2 * number)), list(range(2 * number - 1)), torch.arange(2 * number)[:, None]):
        with accelerator.split_between_processes(things, apply_padding=True) as mine:
            assert len(mine) == 2
            everything = gather_object([int(thing) for thing in mine])
        assert everything[: len(things)] == [int(thing) for thing in things]
    with accelerator.split_between_processes({"a": list(range(8)), "b": torch.arange(8)}) as mine:
        assert mine["a"] == mine["b"].tolist() and len(mine["a"]) == 8 // number


def check_generators(accelerator: Accelerator) -> None:
    torch.manual_seed(accelerator.process_index)
    synchronize_rng_states(["torch"])
    states = accelerator.gather(torch.get_rng_state()[None])
    assert all(torch.equal(state, states[0]) for state in states)


def check_operations(accelerator: Accelerator) -> None:
    rank, number = accelerator.process_index, accelerator.num_processes
    mine = torch.arange(number) + 1.0 + number * rank
    everything = torch.arange(number**2) + 1.0
    assert torch.equal(accelerator.gather(mine), everything)
    assert torch.equal(accelerator.gather({"a": [mine]})["a"][0], everything)
    assert gather_object([rank]) == list(range(number))
    assert accelerator.gather(torch.arange(12).view(4, 3).t()).shape == (3 * number, 4)
    assert torch.equal(functions.broadcast(mine.clone()), everything[:number])
    padded = accelerator.pad_across_processes(torch.ones(number + (rank == 0)))
    assert padded.tolist() == [1.0] * number + [float(rank == 0)]
    columns = everything.view(number, number)
    assert torch.equal(accelerator.reduce(mine.clone(), "sum"), columns.sum(0))
    assert torch.equal(accelerator.reduce(mine.clone(), "mean"), columns.mean(0))
    assert torch.equal(functions.reduce(mine.clone(), "max"), columns.amax(0))
    PartialState().debug = True
    for operation in (functions.pad_across_processes, functions.reduce, functions.broadcast):
        try:
            operation({"tensor": torch.ones((1, 5) if rank == 0 else (1, 2, 5))})
        except functions.DistributedOperationException:
            continue
        raise AssertionError(f"{operation} took shapes that differ")
    PartialState().debug = False


def check_loaders() -> None:
    """Whoever reads, and whether batches are split: all rows come, each once; in order, unless they are shuffled."""
    for options in (dict(), dict(split_batches=True), dict(dispatch_batches=True), dict(use_seedable_sampler=True)):
        accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(**options))
        rows = list(range(16 * accelerator.num_processes))
        for shuffle in (False, True):
            loader = accelerator.prepare(DataLoader(rows, batch_size=8, shuffle=shuffle))
            found = torch.cat([accelerator.gather(batch) for batch in loader]).tolist()
            assert (sorted(found) if shuffle else found) == rows


def check_trigger(accelerator: Accelerator) -> None:
    assert not accelerator.check_trigger()
    if accelerator.is_main_process:
        accelerator.set_trigger()
    assert accelerator.check_trigger()
    assert not accelerator.check_trigger()


def train(accelerator: Accelerator, batch_size: int):
    """The model, and the losses of each process."""
    set_seed(42)
    model = llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader, model, optimizer = accelerator.prepare(loader_of(token_rows(32), batch_size=batch_size), model, optimizer)
    losses = []
    for _ in range(2):
        for batch in loader:
            model.zero_grad()
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            losses.append(loss.item())
    return model, losses


def check_prepare_without_state() -> None:
    """An Accelerator whose state was taken away says so."""
    accelerator = Accelerator()
    AcceleratorState._reset_state()
    try:
        accelerator.prepare(llama())
    except AttributeError as error:
        assert "This happens if `AcceleratorState._reset_state()`" in str(error)
        return
    raise AssertionError("a model was prepared")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_dir", type=Path)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator()
    assert vars(AcceleratorState()) is vars(AcceleratorState())  # once more, as it is
    check_processes(accelerator, args.output_dir)
    check_splitting(accelerator)
    check_generators(accelerator)
    check_operations(accelerator)
    check_loaders()
    split = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
    _, expected = train(split, 2 * accelerator.num_processes)
    model, losses = train(accelerator, 2)
    assert losses == expected
    check_operations(accelerator)  # with a model that waits for the others
    check_trigger(accelerator)
    eval_loader = accelerator.prepare(loader_of(token_rows(8, seed=1), batch_size=2))
    evaluate_and_save(accelerator, model, eval_loader, losses, args.output_dir)
    check_operations(accelerator)
    AcceleratorState._reset_state()
    _, rounded = train(Accelerator(mixed_precision="bf16"), 2)
    assert all(abs(one - other) < 0.1 for one, other in zip(rounded, losses, strict=True))
    check_prepare_without_state()
    Accelerator().end_training()


if __name__ == "__main__":
    if sys.argv[1] == "--reloaded":
        print("reloaded", loss_of(AutoModelForCausalLM.from_pretrained(sys.argv[2]), token_rows(8, seed=1)))
    else:
        main()
