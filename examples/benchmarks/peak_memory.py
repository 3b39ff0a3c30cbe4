"""Peak memory of one worker of eight: DDP, FSDP2 and SDP, in one process without the other seven.

    OMP_NUM_THREADS=1 python examples/benchmarks/peak_memory.py              # CPU, fp32, Llama of 97 M parameters
    python examples/benchmarks/peak_memory.py --device cuda                  # bf16 autocast, 134 M and 1.1 B parameters

Collectives run on torch's fake process group: buffers are allocated as ever, no data moves, values are garbage. What is
summed up: parameters and AdamW's moments this worker stores, DDP's gradient buckets, and the peak of one step above what
was allocated before it (gradients, activations, gathered parameters, buffers of collectives). Every case has a process of
its own; the step measured is the third, when moments exist and DDP has rebuilt its buckets.

On CPU the peak comes from the allocator's events in the profiler, on CUDA from torch.cuda.max_memory_allocated. The CUDA
path has never been run: it was written on a machine without a GPU. DDP's buckets are not measured: they are as
large as the gradients. Its reducer cannot wait for fake collectives, hence the communication hook that does nothing.
"""

import argparse
import gc
import itertools
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sdp import SDPConfig, patch_model
from hf_sdp.engine import shard
from hf_sdp.metrics import measured_peak, state_bytes
from hf_sdp.optimizer import repoint

WORLD_SIZE = 8
MODELS = {
    "97M": dict(vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12),
    "134M": dict(vocab_size=32000, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12),
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


def parallelize(name: str, config: SDPConfig | None, model: LlamaForCausalLM, device: torch.device):
    """The model as rank 0 of the fake world has it, and its optimizer."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)
    if config is not None:
        shard(patch_model(model, config), device)
    elif name == "DDP":
        model = DistributedDataParallel(model.to(device))
        model.register_comm_hook(None, _finished)
    else:
        mesh = DeviceMesh(device.type, torch.arange(WORLD_SIZE))
        for module in (*model.model.layers, model):
            fully_shard(module.to(device), mesh=mesh, reshard_after_forward=name == "FSDP2")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if config is not None:
        repoint(optimizer, model)
    return model, optimizer


def _finished(_, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def measure(name: str, config: SDPConfig | None, model_name: str, device_name: str) -> dict[str, dict[str, int]]:
    """``{"4 x 512": {"parameters": bytes, "moments": bytes, "buckets": bytes, "step": bytes}, ...}``"""
    gc.collect()  # nothing of the last case may be freed while this one is measured
    device = torch.device(device_name)
    model_config = LlamaConfig(**MODELS[model_name], tie_word_embeddings=False, use_cache=False)
    model, optimizer = parallelize(name, config, LlamaForCausalLM(model_config), device)

    def step(num_sequences: int, length: int) -> None:
        ids = torch.zeros(num_sequences, length, dtype=torch.long, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(1, 16)
    step(1, 16)
    stored = state_bytes(model, optimizer)
    result = {}
    for num_sequences, length in BATCHES[device.type]:
        with measured_peak(device) as peak:
            step(num_sequences, length)
        result[f"{num_sequences} x {length}"] = {
            "parameters": stored["parameters"],
            "moments": stored["optimizer"],
            "buckets": stored["parameters"] if name == "DDP" else 0,
            "step": peak[0],
        }
    dist.destroy_process_group()
    return result


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
