"""Do processes that have trained end without fault? Worlds of real processes train two steps and end, many at a time.

    OMP_NUM_THREADS=1 python examples/benchmarks/clean_ends.py --runs 100 --output examples/benchmarks/clean_ends.json

What is looked for is a race between the end of the interpreter and the threads of process groups. It is rare on an idle
machine, so the runs themselves keep it busy; and the threads that are left when the interpreter ends are counted. The
processes are forked from one that has imported everything, and finalize their interpreters, which those of
multiprocessing do not.
"""

import argparse
import atexit
import json
import os
import platform
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

ENDS = ("trainer", "trainer, destroyed", "accelerator", "accelerator, destroyed", "accelerator, end_training")
"""What trains, and what the script does at its end."""


def work(end: str, folder: str) -> None:
    """One worker: train, and return to the end of its process. What was made stays referenced, as in a script."""
    global kept
    import torch
    import torch.distributed as dist
    from transformers import Trainer, TrainingArguments

    from hf_sdp import SDPAccelerator, SDPCallback, SDPConfig
    from hf_sdp.bench.small_llama import small_llama

    host, _, last = end.partition(", ")
    model = _model(small_llama())
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 64
    config = SDPConfig(level="block", coverage=0.5)
    if host == "trainer":
        arguments = TrainingArguments(
            output_dir=folder, max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no"
        )
        kept = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=[SDPCallback(config)])
        kept.train()
        kept.evaluate()
        kept.accelerator.wait_for_everyone()
    else:
        accelerator = SDPAccelerator(cpu=True, sdp_config=config)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        kept = accelerator, model, optimizer
        for _ in range(2):
            accelerator.backward(model(**{name: row[None] for name, row in rows[0].items()}).loss)
            optimizer.step()
            optimizer.zero_grad()
        model.eval()(**{name: row[None] for name, row in rows[0].items()})
        accelerator.wait_for_everyone()
    if last == "destroyed":
        dist.destroy_process_group()
    elif last == "end_training":
        kept[0].end_training()


def _model(config):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(config)


def _count_threads(file: Path) -> None:
    """Write how many threads of gloo this process has (on Linux)."""
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    file.write_text(str(sum("gloo_runloop" in name for name in names)))


def start_world(end: str, num_workers: int, folder: str) -> dict[int, int]:
    """Fork the workers of one run. Returns: pid -> rank. In a worker it does not return, but ends the process."""
    pids = {}
    for rank in range(num_workers):
        pid = os.fork()
        if pid == 0:
            from hf_sdp.bench.workers import join_world

            log = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            atexit.register(_count_threads, Path(folder, f"{rank}.threads"))  # after what is registered later
            join_world(rank, num_workers, f"{folder}/rendezvous")
            work(end, folder)
            sys.exit()
        pids[pid] = rank
    return pids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=100, help="of each end")
    parser.add_argument("--at-once", type=int, default=6, help="runs at a time, so that the machine is busy")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--ends", nargs="+", choices=ENDS, default=ENDS)
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()

    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import hf_sdp.hosts.trainer  # noqa: F401  (what workers share)

    torch.set_num_threads(1)
    waiting = [end for _ in range(options.runs) for end in options.ends]
    running: dict[int, tuple[int, int]] = {}  # pid -> run, rank
    runs: list[tuple[str, str, dict[int, int]]] = []  # end, folder, exit codes by rank
    left: Counter[int] = Counter()
    clean: Counter[str] = Counter()
    threads_left: Counter[str] = Counter()
    faults = []
    while waiting or running:
        while waiting and sum(left.values()) <= (options.at_once - 1) * options.workers:
            end, folder = waiting.pop(), tempfile.mkdtemp()
            number = len(runs)
            runs.append((end, folder, {}))
            pids = start_world(end, options.workers, folder)
            running |= {pid: (number, rank) for pid, rank in pids.items()}
            left[number] = options.workers
        pid, status = os.wait()
        number, rank = running.pop(pid)
        end, folder, codes = runs[number]
        codes[rank] = os.waitstatus_to_exitcode(status)
        left[number] -= 1
        counted = Path(folder, f"{rank}.threads")
        threads_left[end] += int(counted.read_text()) if counted.exists() else 0
        if codes[rank]:
            said = Path(folder, f"{rank}.log").read_text().strip().splitlines()
            faults.append({"end": end, "rank": rank, "exit_code": codes[rank], "said": said[-1:]})
            print(faults[-1], flush=True)
        if left[number] == 0:
            clean[end] += not any(codes.values())
            shutil.rmtree(folder)
    result = {
        "settings": {key: getattr(options, key) for key in ("runs", "at_once", "workers")},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "clean": {end: clean[end] for end in options.ends},
        "threads_left": {end: threads_left[end] for end in options.ends},
        "faults": faults,
    }
    for end in options.ends:
        print(f"{end}: {clean[end]} of {options.runs} clean, {threads_left[end]} threads left")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(faults) or any(threads_left.values()))


if __name__ == "__main__":
    main()
