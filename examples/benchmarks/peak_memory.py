"""Peak memory of one worker of eight: DDP, FSDP2 and SDP, in one process without the other seven.

    OMP_NUM_THREADS=1 python examples/benchmarks/peak_memory.py              # CPU, fp32, Llama of 97 M parameters
    python examples/benchmarks/peak_memory.py --device cuda                  # bf16 autocast, 134 M and 1.1 B parameters

Collectives run on torch's fake process group: buffers are allocated as ever, no data moves, values are garbage. What is
summed up: parameters and AdamW's moments this worker stores, DDP's gradient buckets, and the peak of one step above
what was allocated before it (gradients, activations, gathered parameters, buffers of collectives). Every case has a
process of its own; the step measured is the third, when moments exist and DDP has rebuilt its buckets.

On CPU the peak comes from the allocator's events in the profiler, on CUDA from torch.cuda.max_memory_allocated. The
CUDA path has never been run: it was written on a machine without a GPU. DDP's buckets are not measured: they are as
large as the gradients. Its reducer cannot wait for fake collectives, hence the communication hook that does nothing.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from hf_sdp import SDPConfig
from hf_sdp.bench.fake_world import fake_world, measure_steps, parallelize
from hf_sdp.bench.small_llama import small_llama

WORLD_SIZE = 8
MODELS = {
    "97M": dict(vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12),
    "134M": dict(
        vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
    ),
    "1.1B": dict(
        vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
        num_key_value_heads=4,
    ),
}  # fmt: skip
BATCHES = {"cpu": [(4, 512), (1, 256)], "cuda": [(4, 1024)]}  # (sequences, tokens of each)
SHARDINGS = {
    "full": {},
    "full, reshard": dict(reshard_after_forward=True),
    "none": dict(sharding="none"),
}


def cases(coverages: list[float]) -> dict[str, SDPConfig | None]:
    """Name -> config; None for what is not SDP. FSDP2 reshards after forward, as Accelerate's default does."""
    found: dict[str, SDPConfig | None] = {"DDP": None, "FSDP2": None, "FSDP2, no reshard": None}
    for masking, level, coverage, sharding in itertools.product(
        ("forward", "backward"), ("block", "neuron"), coverages, SHARDINGS
    ):
        name = f"SDP {masking}, {level}, C={coverage:g}, {sharding}"
        found[name] = SDPConfig(masking=masking, level=level, coverage=coverage, **SHARDINGS[sharding])
    return found


def measure(name: str, config: SDPConfig | None, model_name: str, device_name: str) -> dict[str, dict[str, int]]:
    """``{"4 x 512": {"parameters": bytes, "moments": bytes, "buckets": bytes, "step": bytes}, ...}``"""
    device = torch.device(device_name)
    model_config = small_llama(**MODELS[model_name])
    batches = BATCHES[device.type]
    with fake_world(WORLD_SIZE):
        model, optimizer = parallelize(LlamaForCausalLM(model_config), config or name, device)
        measured = measure_steps(model, optimizer, batches, device, autocast=device.type == "cuda")
    return {
        f"{num_sequences} x {length}": {
            "parameters": row["parameters"],
            "moments": row["optimizer"],
            "buckets": row["buckets"],
            "step": row["step"],
        }
        for (num_sequences, length), row in zip(batches, measured, strict=True)
    }


def table(rows: dict[str, dict]) -> str:
    """Markdown, MiB; for every batch the peak of the step, the sum, and the sum relative to FSDP2's."""
    batches = list(rows["FSDP2"])
    columns = ["engine", *_STORED, *(f"{b}: step | sum | / FSDP2" for b in batches)]
    lines = [f"| {' | '.join(columns)} |", "| --- " * (1 + len(_STORED) + 3 * len(batches)) + "|"]
    for name, row in rows.items():
        cells = [name, *(f"{row[batches[0]][kind] / 2**20:.0f}" for kind in _STORED)]
        for batch in batches:
            total, reference = (sum(r[batch].values()) for r in (row, rows["FSDP2"]))
            cells += [f"{row[batch]['step'] / 2**20:.0f}", f"{total / 2**20:.0f}", f"{total / reference:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


_STORED = ("parameters", "moments", "buckets")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=BATCHES, default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: 97M on CPU, 134M and 1.1B on CUDA")
    parser.add_argument("--coverages", type=float, nargs="+", default=[0.25, 0.5, 0.75])
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    results: dict[str, dict] = {}
    for model_name in options.models or (["97M"] if options.device == "cpu" else ["134M", "1.1B"]):
        rows = results[model_name] = {}
        for name, config in cases(options.coverages).items():
            rows[name] = measure(name, config, model_name, options.device)
            if options.output:
                options.output.write_text(json.dumps(results, indent=1))
        print(f"\nLlama {model_name}, {options.device}, MiB\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
