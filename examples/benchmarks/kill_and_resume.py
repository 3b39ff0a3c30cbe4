"""Kill one worker at a random moment, start again, compare the end with a run that nobody disturbed; many times.

    OMP_NUM_THREADS=1 python examples/benchmarks/kill_and_resume.py --kills 20
    OMP_NUM_THREADS=1 python examples/benchmarks/kill_and_resume.py --kills 20 --boundaries

Four real workers train a tiny Llama under the Trainer and save every second step. SIGKILL hits one of them at a moment
drawn from the time between the first step and the end. As a launcher would, the script then stops the others and starts
all again with the same line (``resume_from_checkpoint=last_checkpoint(...)``). After every kill the run goes on to its
end, whose weights must be those of the undisturbed run bit for bit. Options of SDPConfig vary from kill to kill. With
``--boundaries`` there is a coverage schedule, and all kills hit the workers while they rebuild the model for its next
phase; this is slowed down, so that the moments differ.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

from hf_sdp.bench.workers import context, join_world

NUM_WORKERS, NUM_STEPS, SAVE_STEPS = 4, 10, 2
CONFIGS = [
    dict(level="neuron", coverage=0.5),
    dict(level="block", coverage=0.5),
    dict(level="neuron", masking="backward", coverage=0.5),
    dict(level="neuron", coverage=0.75, sharding="none"),
]
BOUNDARIES = [  # at step 4, of which there is a checkpoint, and 7
    dict(level="neuron", coverage_schedule=["0:0.5", "0.4:1"]),
    dict(level="block", coverage_schedule=["0:0.5", "0.7:0.5:masking=backward"]),
    dict(level="neuron", sharding="none", coverage_schedule=["0:0.25", "0.7:0.75"]),
]


def work(rank: int, folder: str, rendezvous: str, sdp: dict) -> None:
    """One worker's life: from the newest complete checkpoint, if there is one, to the end."""
    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    from hf_sdp import SDPCallback, SDPConfig, last_checkpoint, patch_model
    from hf_sdp.bench.small_llama import small_llama

    log = open(f"{folder}.{rank}.log", "a")  # noqa: SIM115, for the life of the process
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    join_world(rank, NUM_WORKERS, rendezvous, store_in_file=True)
    args = TrainingArguments(
        output_dir=folder, max_steps=NUM_STEPS, save_steps=SAVE_STEPS, save_total_limit=1, use_cpu=True, seed=0,
        per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-2, lr_scheduler_type="cosine",
        warmup_steps=2, report_to="none", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    set_seed(0)
    config = small_llama(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        attention_dropout=0.1, use_cache=True,
    )  # fmt: skip
    model = patch_model(LlamaForCausalLM(config), SDPConfig(**sdp))
    slow_down_boundaries(Path(f"{folder}.boundary"))
    ids = torch.randint(0, 128, (256, 16), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    class Started(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            Path(f"{folder}.started").touch()

    trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=[SDPCallback(), Started()])
    trainer.train(resume_from_checkpoint=last_checkpoint(folder))


def slow_down_boundaries(begun: Path) -> None:
    """``begun`` is there once a boundary has begun, and every tensor takes a few milliseconds more."""
    from hf_sdp.engine.handover import Handover

    move = Handover._move

    def move_slowly(*args):
        begun.touch()
        time.sleep(0.003)
        return move(*args)

    Handover._move = move_slowly


class Run:
    """The workers of one life."""

    def __init__(self, folder: Path, sdp: dict):
        self.started = Path(f"{folder}.started")
        self.boundary = Path(f"{folder}.boundary")
        for file in (self.started, self.boundary):
            file.unlink(missing_ok=True)
        self.rendezvous = tempfile.mktemp(prefix="rendezvous-", dir=folder.parent)
        self.processes = [
            context().Process(target=work, args=(rank, str(folder), self.rendezvous, sdp), daemon=True)
            for rank in range(NUM_WORKERS)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, file: Path, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not file.exists():
            if time.monotonic() > deadline or any(p.exitcode is not None for p in self.processes):
                raise RuntimeError(f"the workers did not come to {file.suffix}")
            time.sleep(0.005)

    def ended_well(self, timeout_s: float = 120) -> bool:
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        well = all(process.exitcode == 0 for process in self.processes)
        self.stop()
        return well

    def kill_one(self, rank: int) -> bool:
        """False when it had ended already."""
        alive = self.processes[rank].is_alive()
        if alive:
            os.kill(self.processes[rank].pid, signal.SIGKILL)
            self.processes[rank].join()
        return alive

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def digest(folder: Path) -> str | None:
    if not (folder / f"checkpoint-{NUM_STEPS}").is_dir():
        return None
    return hashlib.sha256((folder / f"checkpoint-{NUM_STEPS}" / "model.safetensors").read_bytes()).hexdigest()


def kill_and_compare(num_kills: int, seed: int = 0, boundaries: bool = False) -> list[dict]:
    """Every kill: when, of whom, what was going on, from where the run went on, and whether it ended as it should."""
    chance, results, undisturbed = random.Random(seed), [], {}
    configs = BOUNDARIES if boundaries else CONFIGS
    with tempfile.TemporaryDirectory() as parent:
        for number in range(num_kills):
            sdp = configs[number % len(configs)]
            key = json.dumps(sdp)
            folder = Path(parent, f"run-{number}")
            if key not in undisturbed:
                reference = Path(parent, f"reference-{len(undisturbed)}")
                run = Run(reference, sdp)
                run.wait_for(run.started)
                began = time.monotonic()
                if not run.ended_well():
                    raise RuntimeError(Path(f"{reference}.0.log").read_text())
                undisturbed[key] = digest(reference), time.monotonic() - began
            expected, length_s = undisturbed[key]
            run, rank = Run(folder, sdp), chance.randrange(NUM_WORKERS)
            after_s = chance.uniform(0, 0.4 if boundaries else length_s)  # a boundary takes about as long
            run.wait_for(run.boundary if boundaries else run.started)
            time.sleep(after_s)
            killed = run.kill_one(rank)
            saving = any(folder.glob("_unfinished-*"))
            time.sleep(chance.uniform(0, 0.2))  # the others go on for a moment, or wait for the one that is gone
            run.stop()
            there = sorted((p.name for p in folder.glob("checkpoint-*")), key=lambda n: int(n.split("-")[1]))
            ended = Run(folder, sdp).ended_well()
            results.append(
                {
                    "sdp": sdp,
                    "killed": killed,
                    "rank": rank,
                    "after_s": round(after_s, 2),
                    "of_s": round(length_s, 2),
                    "while_saving": saving,
                    "resumed_from": there[-1] if there else None,
                    "ended": ended,
                    "equal": ended and digest(folder) == expected,
                }  # fmt: skip
            )
            if not results[-1]["equal"]:
                print(sorted(p.name for p in folder.iterdir()), file=sys.stderr)
                print(Path(f"{folder}.0.log").read_text(), file=sys.stderr)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--boundaries", action="store_true", help="while the model is rebuilt for its next phase")
    parser.add_argument("--output", type=Path, help="JSON of every kill")
    options = parser.parse_args()
    results = kill_and_compare(options.kills, options.seed, options.boundaries)
    for result in results:
        print(json.dumps(result))
    equal = sum(r["equal"] for r in results)
    saving = sum(r["while_saving"] for r in results)
    print(f"{equal} of {len(results)} ended with the weights of the undisturbed run; {saving} were hit while saving")
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n")
    if equal != len(results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
