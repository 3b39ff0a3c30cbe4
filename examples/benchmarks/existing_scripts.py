"""Scripts that know nothing of hf_sdp, trained with it as they are: a table.

    OMP_NUM_THREADS=1 python examples/benchmarks/existing_scripts.py --output examples/benchmarks/existing_scripts.json

The scripts (tests/support/scripts) make the same calls in the same order as those of transformers, Accelerate and TRL,
on tiny models. Of each run: whether its losses are finite and fall, its evaluation loss beside that of the saved folder
in plain transformers or PEFT, in a process without hf_sdp, and what the fullest worker stores (parameters, gradients,
moments) of what a worker of DDP stores. Interrupted, it goes on where it was with ``--folder``.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "support" / "scripts"
STORED_BYTES = Path(__file__).with_name("stored_bytes.py")
TRAINER = [
    "--use_cpu", "--max_steps", "8", "--learning_rate", "1e-2", "--logging_steps", "1", "--report_to", "none",
    "--per_device_train_batch_size", "2", "--per_device_eval_batch_size", "8", "--disable_tqdm", "True",
]  # fmt: skip
SAVES, SAVES_NOT = ["--save_strategy", "steps", "--save_steps", "4"], ["--save_strategy", "no"]
OF_EACH = ["--average_tokens_across_devices", "False"]
"""BERT and T5 do not heed the number of tokens: the Trainer multiplies their loss by the number of workers, under DDP
too."""
IMAGES = [
    "--train_dir", "{digits}/train", "--validation_dir", "{digits}/test", "--cache_dir", "{digits}/cache",
    "--remove_unused_columns", "False", "--max_steps", "16", "--per_device_train_batch_size", "16",
]  # fmt: skip
TRL = [*TRAINER, *SAVES_NOT, "--max_length", "32", "--bf16", "False", "--gradient_checkpointing", "False"]
DPO = [*TRL, "--model_name_or_path", "{clm}"]
LORA = [
    "--use_peft", "--lora_r", "8", "--lora_alpha", "16", "--lora_target_modules", "all-linear", "--max_steps", "32",
    "--learning_rate", "2e-2", "--per_device_train_batch_size", "16",
]  # fmt: skip
RUNS = {
    "clm": ("clm.py", [*TRAINER, *SAVES]),
    "clm, resumed": ("clm.py", [*TRAINER, *SAVES, "--resume_from_checkpoint", "{folder}/checkpoint-4"]),
    "clm, from a checkpoint": ("clm.py", [*TRAINER, *SAVES_NOT, "--model_name_or_path", "{clm}"]),
    "clm without a Trainer": ("clm_no_trainer.py", []),
    "the same, resumed": ("clm_no_trainer.py", ["--resume_from_checkpoint", "{folder}/step_4"]),
    "mlm": ("mlm.py", [*TRAINER, *SAVES_NOT, *OF_EACH]),
    "images": ("image_classification.py", [*TRAINER, *SAVES_NOT, *IMAGES]),
    "translation, summarization": (
        "sequence_to_sequence.py",
        [*TRAINER, *SAVES_NOT, *OF_EACH, "--predict_with_generate", "--generation_max_length", "8"],
    ),
    "TRL sft": ("sft.py", TRL),
    "TRL sft, LoRA": ("sft.py", [*TRL, "--use_peft"]),
    "TRL dpo": ("dpo.py", DPO),
    "TRL dpo, LoRA": ("dpo.py", [*DPO, *LORA]),
    "Accelerate's accumulation": ("accumulation.py", []),
    "Accelerate's operations": ("operations.py", []),
}
"""Name -> script, and its own arguments. ``{folder}``: where the run before has saved; ``{clm}``: that of ``clm``;
``{digits}``: images."""


@dataclass
class Row:
    """Of one run. ``bytes_of_ddp``: what the fullest worker stores, of what a worker of DDP stores."""

    script: str
    workers: int
    level: str
    returncode: int
    first_loss: float = math.nan
    last_loss: float = math.nan
    eval_loss: float = math.nan
    reloaded: float = math.nan
    bytes_of_ddp: float = math.nan

    @property
    def is_right(self) -> bool:
        """All that is claimed."""
        return (
            self.returncode == 0
            and math.isfinite(self.first_loss)
            and self.last_loss < self.first_loss
            and abs(self.eval_loss - self.reloaded) < 1e-3
            and self.bytes_of_ddp < 1
        )


def run(name: str, level: str, workers: int, parent: Path) -> Row:
    """Run one script in a folder of ``parent`` and read what it has written."""
    script, arguments = RUNS[name]
    folder = parent / f"{script}-{level}-{workers}{'-lora' if '--use_peft' in arguments else ''}"
    places = dict(folder=folder, clm=parent / f"clm.py-{level}-{workers}", digits=parent / "digits")
    own = [argument.format(**places) for argument in arguments]
    if "checkpoint" in name:
        folder = folder.with_name(f"{folder.name}-continued")
    stored = parent / f"{name}-{level}-{workers}.stored"
    environment = os.environ | dict(
        OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true", PYTHONPATH=f"{ROOT}", TOKENIZERS_PARALLELISM="false",
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    )  # fmt: skip
    if "{digits}/train" in arguments and not places["digits"].exists():
        subprocess.run([sys.executable, ROOT / "examples" / "digits.py", places["digits"]], check=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    command += [STORED_BYTES, stored, "--level", level, "--coverage", "0.5", SCRIPTS / script, "--output_dir", folder]
    done = subprocess.run([*map(str, command), *own], capture_output=True, text=True, timeout=900, env=environment)
    row = Row(name, workers, level, done.returncode)
    if done.returncode:
        print(done.stdout[-3000:], done.stderr[-6000:], file=sys.stderr)
        return row
    plain = [sys.executable, SCRIPTS / script, "--reloaded", folder, "--output_dir", folder / "plain", *own]
    reloaded = subprocess.run(map(str, plain), capture_output=True, text=True, timeout=600, env=environment)
    found = re.search(r"reloaded ([\d.]+)", reloaded.stdout)
    if found is None:
        print(reloaded.stderr[-3000:], file=sys.stderr)
    row.reloaded = float(found[1]) if found else math.nan
    of_workers = [json.loads(file.read_text()) for file in parent.glob(f"{stored.name}.*")]
    assert len(of_workers) == workers
    row.bytes_of_ddp = max(of_one["stored"] / of_one["dense"] for of_one in of_workers)
    _read(row, folder)
    return row


def _read(row: Row, folder: Path) -> None:
    results = json.loads((folder / "all_results.json").read_text())
    row.eval_loss, losses = results["eval_loss"], results.get("losses")
    if losses is None:
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        losses = [entry["loss"] for entry in history if "loss" in entry]
    of_an_end = max(1, len(losses) // 4)
    row.first_loss = sum(losses[:of_an_end]) / of_an_end
    row.last_loss = sum(losses[-of_an_end:]) / of_an_end


def table(rows: list[Row]) -> str:
    lines = ["| script | workers | level | right | loss, first and last | evaluation | reloaded | stored, of DDP's |"]
    lines.append("| --- " * 8 + "|")
    for row in rows:
        lines.append(
            f"| {row.script} | {row.workers} | {row.level} | {'yes' if row.is_right else 'NO'} | {row.first_loss:.3f}, "
            f"{row.last_loss:.3f} | {row.eval_loss:.4f} | {row.reloaded:.4f} | {row.bytes_of_ddp:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--levels", nargs="+", default=["block", "neuron"])
    parser.add_argument("--only", nargs="+", default=list(RUNS), help="names of runs")
    parser.add_argument("--folder", type=Path, help="where they save; rows of --output are not run again")
    options = parser.parse_args()
    rows = []
    if options.folder is not None and options.output is not None and options.output.exists():
        rows = [Row(**row) for row in json.loads(options.output.read_text())]
    done = {(row.script, row.workers, row.level) for row in rows}
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        for workers, level, name in itertools.product(options.workers, options.levels, options.only):
            if (name, workers, level) not in done:
                rows.append(run(name, level, workers, folder))
                print(table(rows[-1:]).splitlines()[-1], flush=True)
                if options.output:
                    options.output.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print(table(rows))
    sys.exit(0 if all(row.is_right for row in rows) else 1)


if __name__ == "__main__":
    main()
