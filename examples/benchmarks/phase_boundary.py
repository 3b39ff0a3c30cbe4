"""What a boundary of a coverage schedule takes, beside the steps around it: seconds, bytes sent, memory.

    OMP_NUM_THREADS=1 python examples/benchmarks/phase_boundary.py        # 4 workers, writes phase_boundary.json

Llama of 6.85 M parameters, AdamW, fp32, random tokens, gloo on CPU, one thread a worker. Times are the median over the
rounds, of the slowest worker; each round goes to the next phase and back. Peak memory of a boundary is that of torch's
allocations above what a worker stores when it begins (parameters and optimizer state), of the worker with the most;
beside it what it stores more afterwards, and the largest full parameter.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM, set_seed

from hf_sdp import SDPAccelerator, SDPConfig, patch_model
from hf_sdp.bench.small_llama import small_llama
from hf_sdp.bench.workers import launch
from hf_sdp.engine.handover import Handover
from hf_sdp.engine.metrics import measured_peak, state_bytes
from hf_sdp.engine.sharded import get_sharded

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


def measure(options: argparse.Namespace) -> dict:
    """Of every schedule what this worker measured."""
    return {name: _measure(sdp, dist.get_rank(), options.rounds) for name, sdp in SCHEDULES.items()}


def _measure(sdp: dict, rank: int, rounds: int) -> dict:
    set_seed(0)
    accelerator = SDPAccelerator(cpu=True)
    model = patch_model(LlamaForCausalLM(small_llama(**MODEL)), SDPConfig(**sdp))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    random = torch.Generator().manual_seed(rank)
    sent: list[int] = []
    original = Handover.give

    def give(self, *args, **kwargs):
        original(self, *args, **kwargs)
        sent.append(self.bytes_sent)

    Handover.give = give

    def step() -> tuple[float, int]:
        traffic = get_sharded(model, "Measuring").traffic
        before, began = traffic.bytes_sent, time.perf_counter()
        ids = torch.randint(0, MODEL["vocab_size"], (4, 128), generator=random)
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - began, traffic.bytes_sent - before

    def go_to(phase: int) -> float:
        dist.barrier()
        began = time.perf_counter()
        assert accelerator.follow_schedule(phase, 2)
        return time.perf_counter() - began

    result: dict = {"step_s": [[], []], "boundary_s": [[], []], "step_bytes": [0, 0], "boundary_bytes": 0}
    for _ in range(rounds):
        for phase in (0, 1):
            if phase != 0 or result["boundary_s"][1]:
                result["boundary_s"][phase].append(go_to(phase))
            step()
            for _ in range(3):
                seconds, result["step_bytes"][phase] = step()
                result["step_s"][phase].append(seconds)
    go_to(0)
    step()
    before = sum(state_bytes(model, optimizer).values())
    sent.clear()
    with measured_peak(torch.device("cpu")) as peak:
        go_to(1)
    result["boundary_bytes"], result["peak"] = sent[0], peak[0]
    result["stored"] = [before, sum(state_bytes(model, optimizer).values())]
    Handover.give = original
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    everyone = launch(measure, options.workers, options)
    largest = max(p.numel() * 4 for p in LlamaForCausalLM(small_llama(**MODEL)).parameters())
    rows = {}
    for name in SCHEDULES:
        of_all = [of_rank[name] for of_rank in everyone]

        def slowest(key: str, phase: int, of_all=of_all) -> float:
            times = zip(*(of_rank[key][phase] for of_rank in of_all), strict=True)
            return statistics.median(max(round_) for round_ in times)

        rows[name] = {
            "step_s": [slowest("step_s", 0), slowest("step_s", 1)],
            "boundary_s": slowest("boundary_s", 1),
            "step_bytes": [max(r["step_bytes"][phase] for r in of_all) for phase in (0, 1)],
            "boundary_bytes": max(r["boundary_bytes"] for r in of_all),
            "boundary_peak_bytes": max(r["peak"] for r in of_all),
            "stored_bytes": [max(r["stored"][when] for r in of_all) for when in (0, 1)],
            "largest_parameter_bytes": largest,
        }
    print(
        "| schedule | step, ms | boundary, ms | in steps | MiB sent a step | by a boundary | stored, MiB | peak of the "
        "boundary above it |\n" + "| --- " * 8 + "|"
    )
    for name, row in rows.items():
        ms = [f"{1e3 * s:.0f}" for s in (*row["step_s"], row["boundary_s"])]
        mib = [f"{n / 2**20:.1f}" for n in (*row["step_bytes"], row["boundary_bytes"], *row["stored_bytes"])]
        print(
            f"| {name} | {ms[0]}, then {ms[1]} | {ms[2]} | {row['boundary_s'] / row['step_s'][1]:.1f} | {mib[0]}, then "
            f"{mib[1]} | {mib[2]} | {mib[3]}, then {mib[4]} | {row['boundary_peak_bytes'] / 2**20:.1f} |"
        )
    options.output.write_text(json.dumps({"workers": options.workers, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
