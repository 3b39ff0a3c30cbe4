"""LoRA adapters on a frozen Llama: memory of one worker under DDP, FSDP2 and SDP, measured and predicted.

    OMP_NUM_THREADS=1 python examples/benchmarks/lora_memory.py --output examples/benchmarks/lora_memory.json

Measured as in peak_memory.py: torch's fake process group, the CPU allocator's events of the third step or later.
Predicted: ``hf_sdp.estimate``, as ``hf-sdp estimate --lora-r 16`` does.

The base is stored in float32 or in bfloat16. On the latter PEFT stores adapters in float32, and computation is in
bfloat16: FSDP2's mixed precision, for DDP autocast. The CPU's bfloat16 matrix products hold their result in float32 for
a moment, which no prediction has.
"""

import argparse
import json
from pathlib import Path

import torch
from peak_memory import MODELS
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM

from hf_sdp import SDPConfig, Workload
from hf_sdp.bench.fake_world import fake_world, measure_steps, parallelize
from hf_sdp.bench.predicted import predicted_step
from hf_sdp.bench.small_llama import small_llama

WORLD_SIZE = 4
MODEL = "134M"
BATCHES = [(2, 512), (1, 256)]
RESHARD, NONE = dict(reshard_after_forward=True), dict(sharding="none")
ENGINES: dict[str, str | dict] = {
    "DDP": "DDP",
    "FSDP2": "FSDP2",
    "FSDP2, no reshard": "FSDP2, no reshard",
    "SDP forward, block": dict(level="block"),
    "SDP forward, block, reshard": dict(level="block", **RESHARD),
    "SDP forward, block, none": dict(level="block", **NONE),
    "SDP forward, neuron": dict(),
    "SDP forward, neuron, reshard": RESHARD,
    "SDP forward, neuron, none": NONE,
    "SDP backward, block": dict(level="block", masking="backward"),
    "SDP backward, block, reshard": dict(level="block", masking="backward", **RESHARD),
    "SDP backward, neuron": dict(masking="backward"),
    "SDP backward, neuron, reshard": dict(masking="backward", **RESHARD),
}
"""SDP with coverage 0.5. FSDP2 reshards after forward, as Accelerate's default does."""
STATE = ("parameters", "gradients", "optimizer")


def make_model(dtype: str) -> PeftModel:
    """``dtype``: of the frozen base."""
    base = LlamaForCausalLM(small_llama(**MODELS[MODEL])).to(getattr(torch, dtype))
    return get_peft_model(base, LoraConfig(r=16, target_modules="all-linear"))


def rows_of(name: str, dtype: str) -> list[dict]:
    """One row for each batch."""
    said, device = ENGINES[name], torch.device("cpu")
    param_dtype = None if dtype == "float32" else dtype
    engine = said if isinstance(said, str) else SDPConfig(**said, param_dtype=param_dtype)
    model = make_model(dtype)
    workloads = [Workload(batch=b, sequence=length, dtype=dtype, frozen_dtype=dtype) for b, length in BATCHES]
    steps = [predicted_step(model, engine, workload, WORLD_SIZE) for workload in workloads]
    with fake_world(WORLD_SIZE):
        model, optimizer = parallelize(model, engine, device, param_dtype)
        found = measure_steps(model, optimizer, BATCHES, device, autocast=engine == "DDP" and param_dtype is not None)
    rows = []
    for (num_sequences, length), step, measured in zip(BATCHES, steps, found, strict=True):
        peak = sum(measured[kind] for kind in ("parameters", "optimizer", "buckets", "step"))
        memory = vars(step.memory)
        rows.append(
            {
                "base": dtype,
                "engine": name,
                "batch": f"{num_sequences} x {length}",
                "measured": {**{kind: measured[kind] for kind in STATE}, "peak": peak},
                "predicted": {**memory, "bytes_sent": step.bytes_sent, "flops": step.flops},
            }
        )
        if isinstance(engine, SDPConfig):
            rows[-1]["measured"]["bytes_sent"] = measured["bytes_sent"]
    return rows


def table(rows: list[dict]) -> str:
    """Markdown, MiB. Activations and what is sent are predicted, peaks and state are measured."""
    by_engine: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        by_engine.setdefault((row["base"], row["engine"]), []).append(row)
    of_batch = "peak | / FSDP2 | predicted | activations"
    header = " | ".join(
        ["base", "engine", *STATE, "equal", "sent", *(f"{b} x {length}: {of_batch}" for b, length in BATCHES)]
    )
    lines = [f"| {header} |", "| --- " * (header.count("|") + 1) + "|"]
    for (base, engine), of_engine in by_engine.items():
        first = of_engine[0]
        cells = [base, engine, *(_mib(first["measured"][kind], 1) for kind in STATE)]
        cells += ["yes" if all(map(_is_equal, of_engine)) else "NO", _mib(first["predicted"]["bytes_sent"], 1)]
        for row, fsdp2 in zip(of_engine, by_engine.get((base, "FSDP2"), [{}] * len(of_engine)), strict=True):
            peak = row["measured"]["peak"]
            cells += [_mib(peak), f"{peak / fsdp2['measured']['peak']:.2f}" if fsdp2 else ""]
            cells += [_mib(row["predicted"][kind]) for kind in ("peak", "activations")]
        lines.append(f"| {' | '.join(cells)} |")
    errors = [abs(row["predicted"]["peak"] / row["measured"]["peak"] - 1) for row in rows]
    return "\n".join([*lines, "", f"Largest error of a predicted peak: {max(errors):.3%}"])


def _is_equal(row: dict) -> bool:
    """Whether state, and bytes sent where they are counted, are as predicted."""
    return all(value == row["predicted"][kind] for kind, value in row["measured"].items() if kind != "peak")


def _mib(nbytes: int, digits: int = 0) -> str:
    return f"{nbytes / 2**20:.{digits}f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    rows: list[dict] = []
    for dtype in options.bases:
        for name in options.engines:
            rows += rows_of(name, dtype)
            if options.output:
                options.output.write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
