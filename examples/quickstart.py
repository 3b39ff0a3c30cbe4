"""Train the same small Llama with DDP, FSDP2 and SDP, one after the other, and compare what a worker stores and sends.

Same initial weights, same data, same tokens per step; all numbers are measured while it trains. Then the checkpoint
that SDP saved is loaded with plain transformers and generates a text. Run it in the repository root.
"""

import json
import subprocess
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console
from rich.table import Table

ENGINES = {"ddp": "DDP", "fsdp2": "FSDP2", "sdp": "SDP"}
MIB = 2**20
ROWS = {  # name in the results -> label, divisor, format
    "parameters_bytes": ("parameters, MiB", MIB, "{:.1f}"),
    "gradients_bytes": ("gradients, MiB", MIB, "{:.1f}"),
    "optimizer_bytes": ("optimizer state, MiB", MIB, "{:.1f}"),
    "peak_bytes": ("peak memory of a step, MiB", MIB, "{:.1f}"),
    "bytes_sent_per_step": ("sent per step, MiB", MIB, "{:.1f}"),
    "step_time_s": ("median step, s", 1, "{:.2f}"),
    "train_loss": ("training loss, last logged", 1, "{:.3f}"),
    "eval_loss": ("evaluation loss, full model", 1, "{:.3f}"),
}


def parse() -> Namespace:
    parser = ArgumentParser(prog="quickstart.sh", description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--level", choices=["neuron", "block"], default="neuron", help="unit that is held or not held")
    parser.add_argument("--masking", choices=["forward", "backward"], default="forward", help="of what is not held")
    parser.add_argument("--coverage", type=float, default=0.5, help="share of the maskable parameters a worker holds")
    parser.add_argument("--sharding", choices=["full", "none"], default="full", help="shard among the holders, or not")
    parser.add_argument("--workers", type=int, default=4, help="local worker processes on the CPU, at least 2")
    parser.add_argument("--steps", type=int, default=80, help="optimizer steps of each engine")
    parser.add_argument("--folder", type=Path, default=Path("runs/quickstart"), help="results go here")
    arguments = parser.parse_args()
    if arguments.workers < 2:
        parser.error(f"--workers must be at least 2, got {arguments.workers}")
    return arguments


def train(engine: str, arguments: Namespace) -> dict:
    """Results of one engine, trained in its own worker processes."""
    folder = arguments.folder / engine
    command = ["accelerate", "launch", "--config_file", "configs/accelerate/cpu_4.yaml"]
    command += ["--num_processes", str(arguments.workers), "examples/pretrain_llama.py", "--engine", engine]
    command += ["--max_steps", str(arguments.steps), "--logging_steps", str(max(5, arguments.steps // 6))]
    command += ["--output_dir", str(folder)]
    command += ["--results_file", str(folder / "results.json"), "--cache_dir", str(arguments.folder / "cache")]
    if engine == "sdp":
        for name in ("level", "masking", "coverage", "sharding"):
            command += [f"--sdp_{name}", str(getattr(arguments, name))]
    Console().rule(ENGINES[engine])
    print(" ".join(command), flush=True)
    subprocess.run(command, check=True)
    return json.loads((folder / "results.json").read_text())


def table(results: dict[str, dict]) -> Table:
    """One column per engine; of the workers the one that stores or sends most."""
    sdp = results["sdp"]
    settings = "{level}, {masking}, coverage {coverage}, sharding {sharding}".format(**sdp["sdp"])
    grid = Table(
        title=f"{sdp['workers']} workers, {sdp['tokens_per_step']} tokens per step, {sdp['steps']} steps",
        caption=f"SDP: {settings}. With forward masking its training loss is of the subnetworks. "
        "So few steps compare costs, not quality.",
    )
    grid.add_column("per worker")
    for engine in results:
        grid.add_column(ENGINES[engine], justify="right")
    for name, (label, divisor, form) in ROWS.items():
        grid.add_row(label, *(form.format(result[name] / divisor) for result in results.values()))
    return grid


def main() -> None:
    arguments = parse()
    results = {engine: train(engine, arguments) for engine in ENGINES}
    console = Console()
    console.print(table(results))
    console.rule("SDP's checkpoint in plain transformers")
    subprocess.run([sys.executable, "examples/generate.py", str(arguments.folder / "sdp")], check=True)


if __name__ == "__main__":
    main()
