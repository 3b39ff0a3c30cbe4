"""Peak memory of one worker of eight, and on a GPU the time of its steps: DDP, FSDP2 and SDP, without the other seven.

    OMP_NUM_THREADS=1 python examples/benchmarks/peak_memory.py              # CPU, fp32, Llama of 97 M parameters
    python examples/benchmarks/peak_memory.py --device cuda                  # bf16, 134 M and 1.1 B parameters
    python examples/benchmarks/peak_memory.py --device cuda --models 8B      # the shape of Llama 3 8B

Collectives run on torch's fake process group: buffers are allocated as ever, no data moves, values are garbage. What is
summed up: parameters and AdamW's moments this worker stores, DDP's gradient buckets, and the peak of one step above
what was allocated before it (gradients, activations, gathered parameters, buffers of collectives). The step measured is
the third or later, when moments exist and DDP has rebuilt its buckets. Beside it stands what ``hf_sdp.estimate``
predicts.

On CPU the peak comes from the allocator's events in the profiler, on CUDA from torch.cuda.max_memory_allocated. The
CUDA path has never been run: it was written on a machine without a GPU. DDP's buckets are not measured: they are as
large as the gradients. Its reducer cannot wait for fake collectives, hence the communication hook that does nothing.

bf16 is for each engine what one would use: DDP computes under autocast, FSDP2 and SDP gather in bfloat16
(``param_dtype``). Parameters, their gradients and the moments are float32 with all of them; FSDP2 and SDP reduce
gradients in bfloat16, DDP in float32. Times are of one step on the clock, with the device synchronized before and after
it: what a worker computes, without any communication.
"""

import argparse
import itertools
import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from hf_sdp import SDPConfig
from hf_sdp.bench.fake_world import fake_world, measure_steps, parallelize
from hf_sdp.bench.predicted import predicted_step
from hf_sdp.bench.small_llama import small_llama
from hf_sdp.workload import Workload

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
    "8B": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192,
    ),
}  # fmt: skip
BATCHES = {"97M": [(4, 512), (1, 256)], "8B": [(1, 2048)]}
"""Of a model (sequences, tokens of each), else ``BATCH``."""
BATCH = (4, 1024)
SHARDINGS = {
    "full": {},
    "full, reshard": dict(reshard_after_forward=True),
    "none": dict(sharding="none"),
}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
DEFAULTS = {
    "cpu": dict(
        models=["97M"], coverages=[0.25, 0.5, 0.75], maskings=["forward", "backward"], shardings=list(SHARDINGS)
    ),
    "cuda": dict(
        models=["134M", "1.1B"], coverages=[0.25, 0.5], maskings=["forward"], shardings=["full", "full, reshard"]
    ),
}


def cases(
    coverages: list[float], maskings: list[str], shardings: list[str], param_dtype: str | None
) -> dict[str, SDPConfig | str]:
    """Name -> engine, as in ``parallelize``. FSDP2 reshards after forward, as Accelerate's default does."""
    found: dict[str, SDPConfig | str] = {name: name for name in ("DDP", "FSDP2", "FSDP2, no reshard")}
    for masking, level, coverage, sharding in itertools.product(maskings, ("block", "neuron"), coverages, shardings):
        name = f"SDP {masking}, {level}, C={coverage:g}, {sharding}"
        options = dict(masking=masking, level=level, coverage=coverage, param_dtype=param_dtype)
        found[name] = SDPConfig(**options, **SHARDINGS[sharding])
    return found


def measure(engine: SDPConfig | str, model_name: str, device_name: str) -> dict[str, dict[str, float]] | None:
    """``{"4 x 512": {"parameters": bytes, "moments": bytes, "buckets": bytes, "step": bytes, "predicted": bytes},
    ...}``, on CUDA also ``"step_s"``. None: it does not fit into the GPU."""
    device, dtype = torch.device(device_name), DTYPES[device_name]
    model_config, batches = small_llama(**MODELS[model_name]), BATCHES.get(model_name, [BATCH])
    param_dtype = dtype if dtype != "float32" else None
    try:
        with fake_world(WORLD_SIZE):
            with device:  # a model of 8 B is never in the memory of the host
                model = LlamaForCausalLM(model_config)
            model, optimizer = parallelize(model, engine, device, param_dtype)
            is_autocast = engine == "DDP" and param_dtype is not None
            measured = measure_steps(model, optimizer, batches, device, autocast=is_autocast)
    except torch.OutOfMemoryError:
        return None
    found = {}
    for (num_sequences, length), row in zip(batches, measured, strict=True):
        workload = Workload(batch=num_sequences, sequence=length, dtype=dtype)
        found[f"{num_sequences} x {length}"] = {
            "parameters": row["parameters"],
            "moments": row["optimizer"],
            "buckets": row["buckets"],
            "step": row["step"],
            "predicted": predicted_step(model_config, engine, workload, WORLD_SIZE).memory.peak,
            **({"step_s": row["step_s"]} if "step_s" in row else {}),
        }
    return found


_STORED = ("parameters", "moments", "buckets")


def table(rows: dict[str, dict | None]) -> str:
    """Markdown, MiB; for every batch the peak of the step, the sum, the sum relative to FSDP2's, and the error of what
    was predicted; where it is measured the time of a step, and relative to DDP's."""
    reference = rows["FSDP2"]
    if reference is None:
        return "FSDP2 does not fit."
    times = [batch for batch, row in reference.items() if "step_s" in row]
    columns = ["engine", *_STORED]
    for batch in reference:
        columns += [f"{batch}: step", "sum", "/ FSDP2", "predicted"]
        columns += ["step, ms", "/ DDP"] if batch in times else []
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for name, row in rows.items():
        if row is None:
            lines.append(f"| {name} | out of memory {'| ' * (len(columns) - 1)}|")
            continue
        cells = [name, *(f"{next(iter(row.values()))[kind] / 2**20:.0f}" for kind in _STORED)]
        for batch, of_batch in row.items():
            total, of_fsdp = _total(of_batch), _total(reference[batch])
            cells += [f"{of_batch['step'] / 2**20:.0f}", f"{total / 2**20:.0f}", f"{total / of_fsdp:.2f}"]
            cells += [f"{of_batch['predicted'] / 2**20:.0f} ({of_batch['predicted'] / total - 1:+.1%})"]
            if batch in times:
                ddp = rows["DDP"]
                cells += [f"{1000 * of_batch['step_s']:.1f}"]
                cells += ["" if ddp is None else f"{of_batch['step_s'] / ddp[batch]['step_s']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _total(row: dict[str, float]) -> float:
    return row["step"] + sum(row[kind] for kind in _STORED)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEFAULTS, default="cpu")
    parser.add_argument("--models", nargs="+", choices=MODELS, help="default: 97M on CPU, 134M and 1.1B on CUDA")
    parser.add_argument("--coverages", type=float, nargs="+")
    parser.add_argument("--maskings", nargs="+", choices=["forward", "backward"], help="default: on CUDA forward")
    parser.add_argument("--shardings", nargs="+", choices=SHARDINGS, help='default: on CUDA without "none"')
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    chosen = {name: getattr(options, name) or default for name, default in DEFAULTS[options.device].items()}
    dtype = DTYPES[options.device]
    results: dict[str, dict] = {}
    for model_name in chosen.pop("models"):
        rows = results[model_name] = {}
        for name, engine in cases(**chosen, param_dtype=None if dtype == "float32" else dtype).items():
            rows[name] = measure(engine, model_name, options.device)
            if options.output:
                options.output.write_text(json.dumps(results, indent=1))
        print(f"\nLlama {model_name}, {options.device}, {dtype}, MiB\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
