"""Kill workers of one unattended run, one after the other, and compare its end with a run that nobody disturbed.

    OMP_NUM_THREADS=1 python examples/benchmarks/unattended.py --kills 10

The run is ``torchrun --max-restarts``: after every SIGKILL of a worker its agent stops the others and starts all of
them again, and nobody says from where to go on. The script that it runs (``--work``) has one line for that, the same in
every life: ``trainer.train(resume_from_checkpoint=hf_sdp.last_checkpoint(args.output_dir))``. Kills hit a random worker
some steps after the first of its life, so that some fall into a save.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NUM_WORKERS, SAVE_STEPS = 2, 5


def work(folder: Path, num_steps: int) -> None:
    """One worker's life, as in a user's script."""
    import torch
    from transformers import LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    import hf_sdp
    from hf_sdp import SDPCallback, SDPConfig
    from hf_sdp.bench.small_llama import small_llama

    args = TrainingArguments(
        output_dir=str(folder / "run"), max_steps=num_steps, save_steps=SAVE_STEPS, save_total_limit=2, use_cpu=True,
        per_device_train_batch_size=2, learning_rate=1e-2, report_to="none", disable_tqdm=True, logging_steps=5,
        enable_jit_checkpoint=True,
    )  # fmt: skip
    torch.manual_seed(0)
    config = small_llama(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        attention_dropout=0.1, use_cache=True,
    )  # fmt: skip
    ids = torch.randint(0, 128, (256, 16), generator=torch.Generator().manual_seed(1))
    rows = [{"input_ids": row, "labels": row} for row in ids]

    class Alive(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            new = folder / f"new-{args.process_index}"
            new.write_text(f"{os.getpid()} {state.global_step}")
            new.rename(folder / f"alive-{args.process_index}")

    model = LlamaForCausalLM(config)
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[SDPCallback(SDPConfig(coverage=0.5)), Alive()])
    result = trainer.train(resume_from_checkpoint=hf_sdp.last_checkpoint(args.output_dir))
    (folder / f"ended-{args.process_index}").write_text(str(result.global_step))


def start(folder: Path, num_steps: int, max_restarts: int) -> subprocess.Popen:
    folder.mkdir()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(NUM_WORKERS), "--max-restarts",
        str(max_restarts), "--monitor-interval", "0.1", "--standalone",
        __file__, "--work", str(folder), "--steps", str(num_steps),
    ]  # fmt: skip
    # Without the variable and c10d (--standalone) the workers of torch 2.13 find the addresses of the life before.
    environment = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(folder / "log", "w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def kill_one(folder: Path, run: subprocess.Popen, chance: random.Random, killed: set[int]) -> dict | None:
    """Kill a worker of the next life, some steps after its first. Returns: what was hit; None when the run is over."""
    alive, num_steps, first = folder / f"alive-{chance.randrange(NUM_WORKERS)}", chance.randint(1, 3 * SAVE_STEPS), None
    while run.poll() is None:
        text = alive.read_text().split() if alive.is_file() else []
        process, step = map(int, text) if len(text) == 2 else (0, 0)
        if process and process not in killed:
            first = first or step
            if step >= first + num_steps:
                time.sleep(chance.uniform(0, 0.3))
                saving = any((folder / "run").glob("_unfinished-*"))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                    killed.update(int(f.read_text().split()[0]) for f in folder.glob("alive-*"))
                    return {"rank": int(alive.name[-1]), "first_step": first, "step": step, "while_saving": saving}
        time.sleep(0.01)
    return None


def digest(folder: Path, num_steps: int) -> str:
    return hashlib.sha256((folder / "run" / f"checkpoint-{num_steps}" / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON of every kill")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work, options.steps)
    chance, kills, killed = random.Random(options.seed), [], set()
    with tempfile.TemporaryDirectory() as parent:
        undisturbed, folder = Path(parent, "undisturbed"), Path(parent, "killed")
        if start(undisturbed, options.steps, 0).wait() != 0:
            raise SystemExit((undisturbed / "log").read_text())
        run = start(folder, options.steps, options.kills)
        for _ in range(options.kills):
            hit = kill_one(folder, run, chance, killed)
            if hit:
                kills.append(hit)
                print(json.dumps(hit), flush=True)
        code = run.wait()
        names = sorted(p.name for p in (folder / "run").iterdir())
        equal = code == 0 and digest(folder, options.steps) == digest(undisturbed, options.steps)
        print(f"{len(kills)} workers killed; exit code {code}; {names}; the undisturbed run's weights: {equal}")
        if options.output:
            options.output.write_text(json.dumps({"kills": kills, "exit_code": code, "equal": equal}, indent=1) + "\n")
        if not equal or len(kills) < options.kills:
            print((folder / "log").read_text(), file=sys.stderr)
            raise SystemExit(1)


if __name__ == "__main__":
    main()
