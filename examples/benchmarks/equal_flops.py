"""Evaluation loss of the full model at equal training FLOPs: data parallel against Subnetwork Data Parallelism.

    OMP_NUM_THREADS=1 python examples/benchmarks/equal_flops.py              # trains what equal_flops.json lacks
    python examples/benchmarks/equal_flops.py --plot                         # equal_flops.png and a table

Eight virtual workers in one process (``SDPConfig(simulate=8)``) under the plain Trainer; micro-batch k of the eight of
a step is worker k's. Data parallel is the same Trainer with the unpatched model. All methods see the same tokens a
step, in the same order, with the same learning rate (chosen for data parallel, in runs of 200 steps), and warm-up and
cosine over their own length.

A subnetwork of coverage 0.5 costs a little more than half of the full model, since embeddings and head are not cut. The
FLOPs of a step are therefore counted (forward and backward, attention included), and SDP gets as many steps as cost
what data parallel costs: a little fewer than twice as many. Evaluation is not counted.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from hf_sdp import SDPConfig, patch_model

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import corpus  # noqa: E402

NUM_WORKERS = 8
SEQUENCES, LENGTH = 2, 128  # of a micro-batch: 2048 tokens a step
NUM_EVALUATIONS = 8
METHODS = {
    "data parallel": None,
    "SDP neuron, C=0.5": "neuron",
    "SDP block, C=0.5": "block",
}
MODEL = dict(
    vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=LENGTH, tie_word_embeddings=False, initializer_range=0.08,
)  # fmt: skip


def build(method: str, seed: int) -> LlamaForCausalLM:
    set_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**MODEL))
    if (level := METHODS[method]) is not None:
        patch_model(model, SDPConfig(simulate=NUM_WORKERS, level=level, coverage=0.5, seed=seed))
    return model


def step_flops(method: str, seed: int) -> int:
    """FLOPs of forward and backward of one step's micro-batches."""
    model = build(method, seed).train()
    ids = torch.zeros(SEQUENCES, LENGTH, dtype=torch.long)
    # The fused CPU attention is not known to the counter.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for _ in range(NUM_WORKERS):
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops()


def train(method: str, seed: int, baseline_steps: int, lr: float) -> dict:
    """One run: its number of steps, their FLOPs, and ``curve``: [step, evaluation loss] pairs."""
    torch.set_num_threads(1)
    flops = step_flops(method, seed)
    per_evaluation = round(baseline_steps * step_flops("data parallel", seed) / flops / NUM_EVALUATIONS)
    num_steps = per_evaluation * NUM_EVALUATIONS
    data, _ = corpus.load(MODEL["vocab_size"], LENGTH)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=num_steps, seed=seed, learning_rate=lr, lr_scheduler_type="cosine",
            warmup_steps=num_steps // 20, weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0, use_cpu=True,
            per_device_train_batch_size=SEQUENCES, gradient_accumulation_steps=NUM_WORKERS,
            per_device_eval_batch_size=16, eval_strategy="steps", eval_steps=per_evaluation,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=per_evaluation,
        )  # fmt: skip
        valid = data["valid"]
        trainer = Trainer(
            build(method, seed), args, train_dataset=data["train"],
            eval_dataset=valid.select(range(0, len(valid), 5)),
        )  # fmt: skip
        trainer.train()
    curve = [(entry["step"], entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"steps": num_steps, "step_flops": flops, "curve": curve}


def train_missing(path: Path, seeds: list[int], methods: list[str], steps: int, lr: float, processes: int) -> None:
    """Train every run that ``path`` does not have yet and add it there as soon as it is done."""
    jobs = [(m, s, steps, lr) for s in seeds for m in methods]
    jobs = [job for job in jobs if _key(*job) not in _finished(path)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(train, *job): job for job in jobs}
        for future in as_completed(futures):
            results = {**_finished(path), _key(*futures[future]): future.result()}
            unfinished = path.with_suffix(".part")
            unfinished.write_text(json.dumps(results, indent=1, sort_keys=True))
            os.replace(unfinished, path)
            print(_key(*futures[future]), "->", future.result()["curve"][-1], flush=True)


def _finished(path: Path) -> dict[str, dict]:
    return json.loads(path.read_text()) if path.exists() else {}


def _key(method: str, seed: int, steps: int, lr: float) -> str:
    return f"{method} | seed {seed} | budget {steps} steps | lr {lr:g}"


def curves(path: Path, seeds: list[int], steps: int, lr: float) -> dict[str, tuple[list, list[list[float]]]]:
    """Per method: training FLOPs relative to data parallel's whole run, and losses[seed][point].

    Only seeds with which every method is done. Raises: SystemExit when there is none.
    """
    results = _finished(path)
    seeds = [s for s in seeds if all(_key(method, s, steps, lr) in results for method in METHODS)]
    if not seeds:
        raise SystemExit(f"{path.name} has no seed with which all of {list(METHODS)} are done.")
    whole = results[_key("data parallel", seeds[0], steps, lr)]
    budget = whole["steps"] * whole["step_flops"]
    found = {}
    for method in METHODS:
        runs = [results[_key(method, seed, steps, lr)] for seed in seeds]
        flops = [step * runs[0]["step_flops"] / budget for step, _ in runs[0]["curve"]]
        found[method] = flops, [[loss for _, loss in run["curve"]] for run in runs]
    return found


def plot(found: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.2, 4.5), dpi=150)
    for (method, (flops, losses)), color in zip(found.items(), ("#444444", "#0072b2", "#d55e00"), strict=True):
        points = list(zip(*losses, strict=True))
        final = statistics.mean(points[-1])
        axes.plot(
            flops, [statistics.mean(p) for p in points], color=color, marker="o", ms=3.5, label=f"{method}: {final:.3f}"
        )
        axes.fill_between(flops, [min(p) for p in points], [max(p) for p in points], color=color, alpha=0.18, lw=0)
    axes.set_xlabel("training FLOPs, relative to the whole data parallel run")
    axes.set_ylabel("evaluation loss of the full model (nats per token)")
    axes.set_xlim(0, 1.02)
    num_seeds = len(next(iter(found.values()))[1])
    axes.legend(title=f"final loss, mean of {num_seeds} seed(s), band: min to max", frameon=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def table(found: dict) -> str:
    lines = ["| method | final loss by seed | mean | minus data parallel, by seed |", "| --- | --- | --- | --- |"]
    reference = [losses[-1] for losses in found["data parallel"][1]]
    for method, (_, losses) in found.items():
        final = [run[-1] for run in losses]
        minus = ", ".join(f"{a - b:+.3f}" for a, b in zip(final, reference, strict=True))
        lines.append(
            f"| {method} | {', '.join(f'{loss:.3f}' for loss in final)} | {statistics.mean(final):.3f} | {minus} |"
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600, help="steps of data parallel: the FLOP budget")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--results", type=Path, default=HERE / "equal_flops.json")
    parser.add_argument("--plot", action="store_true", help="draw finished seeds instead of training")
    options = parser.parse_args()
    if options.plot:
        found = curves(options.results, options.seeds, options.steps, options.lr)
        plot(found, options.results.with_suffix(".png"))
        print(table(found))
    else:
        train_missing(options.results, options.seeds, options.methods, options.steps, options.lr, options.processes)


if __name__ == "__main__":
    main()
