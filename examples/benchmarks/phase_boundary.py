"""What a boundary of a coverage schedule takes, beside the steps around it: seconds, bytes sent, memory.

    OMP_NUM_THREADS=1 python examples/benchmarks/phase_boundary.py        # 4 workers, writes phase_boundary.json

Llama of 6.85 M parameters, AdamW, fp32, random tokens, gloo on CPU, one thread a worker. Times are the median over the
rounds, of the slowest worker; each round goes to the next phase and back. Memory is what torch has allocated, of the
worker with the highest peak: before the boundary (parameters and optimizer state), at most, and after it.
"""

import argparse
import json
import statistics
from pathlib import Path

from transformers import LlamaForCausalLM

from hf_sdp.bench.boundary import Crossing, Training, cross
from hf_sdp.bench.small_llama import small_llama
from hf_sdp.bench.workers import launch

MODEL = dict(
    vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=128,
)  # fmt: skip
GROWS = ["0:0.5", "0.5:1"]
SCHEDULES = {
    "neuron, 0.5 to 1": dict(level="neuron", coverage_schedule=GROWS),
    "block, 0.5 to 1": dict(level="block", coverage_schedule=GROWS),
    "neuron, forward to backward": dict(level="neuron", coverage_schedule=["0:0.5", "0.5:0.5:masking=backward"]),
    "neuron, uniform to linear": dict(level="neuron", coverage_schedule=["0:0.5", "0.5:0.5:depth_profile=linear"]),
    "neuron, 0.5 to 1, sharding none": dict(level="neuron", sharding="none", coverage_schedule=GROWS),
}


def measure(rounds: int) -> dict[str, tuple[list, list, list, Crossing]]:
    """Of every schedule: seconds of each step by phase, bytes of a step by phase, seconds of each boundary, memory."""
    return {name: (*_times(sdp, rounds), cross(sdp, MODEL)) for name, sdp in SCHEDULES.items()}


def _times(sdp: dict, rounds: int) -> tuple[list, list, list]:
    training, seconds, sent, boundaries = Training(sdp, MODEL), [[], []], [0, 0], []
    for number in range(rounds):
        for phase in (0, 1):
            if phase == 1:
                boundaries.append(training.go_to(1))
            elif number > 0:
                training.go_to(0)
            training.step(4, 128)  # the first one of a phase allocates
            for _ in range(2):
                step_s, sent[phase] = training.step(4, 128)
                seconds[phase].append(step_s)
    return seconds, sent, boundaries


def _slowest(of_workers: list[list[float]]) -> float:
    return statistics.median(map(max, zip(*of_workers, strict=True)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    everyone = launch(measure, options.workers, options.rounds)
    rows = {}
    for name in SCHEDULES:
        seconds, sent, boundaries, crossings = zip(*(of_rank[name] for of_rank in everyone), strict=True)
        highest = max(crossings, key=lambda crossing: crossing.peak)
        rows[name] = {
            "step_s": [_slowest([of_rank[phase] for of_rank in seconds]) for phase in (0, 1)],
            "boundary_s": _slowest(list(boundaries)),
            "step_bytes": [max(of_rank[phase] for of_rank in sent) for phase in (0, 1)],
            "boundary_bytes": max(crossing.sent for crossing in crossings),
            "allocated_bytes": [highest.before, highest.peak, highest.after],
        }
    print(
        "| schedule | step, ms | boundary, ms | in steps | MiB sent: a step | a boundary | MiB: before, most, after |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, row in rows.items():
        ms = [f"{1e3 * s:.0f}" for s in (*row["step_s"], row["boundary_s"])]
        mib = [f"{n / 2**20:.1f}" for n in (*row["step_bytes"], row["boundary_bytes"], *row["allocated_bytes"])]
        print(
            f"| {name} | {ms[0]}, then {ms[1]} | {ms[2]} | {row['boundary_s'] / row['step_s'][1]:.1f} | {mib[0]}, then "
            f"{mib[1]} | {mib[2]} | {mib[3]}, {mib[4]}, {mib[5]} |"
        )
    largest = max(p.nbytes for p in LlamaForCausalLM(small_llama(**MODEL)).parameters())
    print(f"The largest full parameter: {largest / 2**20:.1f} MiB.")
    settings = {
        "workers": options.workers,
        "rounds": options.rounds,
        "model": MODEL,
        "largest_bytes": largest,
    }
    options.output.write_text(json.dumps(settings | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
