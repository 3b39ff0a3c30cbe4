"""What the vote before each optimizer step costs (SDPConfig.on_nonfinite): with and without it, step by step in turn.

    OMP_NUM_THREADS=1 python examples/benchmarks/vote.py

Workers of one run train two copies of a model, one that votes and one that does not, with clipping and without. A
step's time is that of the slowest worker; the cost is the median over the rounds of the difference between two
neighbours. "CPU" is the processor time of all workers, which other programs on the machine
disturb least.
"""

import argparse
import resource
import statistics
import time

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM

from hf_sdp import SDPAccelerator, SDPConfig, patch_model
from hf_sdp.bench.small_llama import small_llama
from hf_sdp.bench.workers import launch

MODELS = {
    "tiny": (dict(), 64),
    "small": (dict(vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=8), 1024),
}
"""Changes of ``small_llama``, and tokens of each worker in a step."""
VOTES = {"without": "ignore", "with": "stop"}


def worker(model: dict, tokens: int, clips: bool, rounds: int) -> tuple[list[float], list[float]]:
    """Seconds of this worker in every timed step, "without" and "with" in turn: of the clock, and of its processor."""
    steps = []
    for on_nonfinite in VOTES.values():
        torch.manual_seed(0)
        config = small_llama(**{**model, "max_position_embeddings": 128})
        accelerator = SDPAccelerator(cpu=True)
        patched = patch_model(LlamaForCausalLM(config), SDPConfig(on_nonfinite=on_nonfinite))
        optimizer = torch.optim.AdamW(patched.parameters(), lr=1e-4)
        steps.append((accelerator, *accelerator.prepare(patched, optimizer)))
    ids = torch.randint(0, config.vocab_size, (max(1, tokens // 128), min(tokens, 128)))
    wall, cpu = [], []
    for _ in range(rounds):
        for accelerator, patched, optimizer in steps:
            dist.barrier()
            began, used = time.perf_counter(), _cpu_s()
            accelerator.backward(patched(input_ids=ids, labels=ids).loss)
            if clips:
                accelerator.clip_grad_norm_(patched.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            wall.append(time.perf_counter() - began)
            cpu.append(_cpu_s() - used)
    return wall, cpu


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=4)
    options = parser.parse_args()
    print("| model | clipping | step without, ms | vote, ms | of the step | of its CPU |\n" + "| --- " * 6 + "|")
    for name, (model, tokens) in MODELS.items():
        for clips in (True, False):
            measured = launch(worker, options.workers, model, tokens, clips, options.rounds + options.warmup)
            wall = [max(step) for step in zip(*(w for w, _ in measured), strict=True)][2 * options.warmup :]
            cpu = [sum(step) for step in zip(*(c for _, c in measured), strict=True)][2 * options.warmup :]
            without, cost = statistics.median(wall[::2]), _median_difference(wall)
            cpu_cost = _median_difference(cpu) / statistics.median(cpu[::2])
            print(
                f"| {name} | {'yes' if clips else 'no'} | {1e3 * without:.1f} | {1e3 * cost:+.2f} | "
                f"{cost / without:+.1%} | {cpu_cost:+.1%} |",
                flush=True,
            )


def _median_difference(values: list[float]) -> float:
    return statistics.median(b - a for a, b in zip(values[::2], values[1::2], strict=True))


if __name__ == "__main__":
    main()
