"""Step time and bytes sent: DDP, FSDP2 and SDP side by side in the same processes, over gloo on CPU.

    python examples/benchmarks/step_time.py                                  # 4 workers, writes step_time.json
    python examples/benchmarks/step_time.py --profile "SDP neuron C=0.5"     # where the time of a step goes

All engines exist at once and are stepped in turn, one step of each a round, starting with another one every round, so
that a busy machine slows all of them alike. A step is forward, backward, clipping, and the fused AdamW of the Trainer's
default. Its time is that of the slowest worker, median over the rounds; "CPU" is the processor time that all workers spent
on it together, which other programs on the machine disturb least. One thread a worker. Llama of 6.85 M parameters, fp32,
random tokens.

Bytes are counted in one step after the timed ones: of an all-gather or reduce-scatter over n members each sends (n-1)/n of
the gathered size, of an all-reduce twice that. That is what a ring sends; gloo's reduce-scatter is an all-reduce inside.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sdp import SDPAccelerator, SDPConfig, make_plan, patch_model
from hf_sdp.traffic import Traffic

LENGTH = 128
MAX_NORM = 1.0
MODEL = dict(
    vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=LENGTH, tie_word_embeddings=False,
)  # fmt: skip
SDP_OPTIONS = {
    "SDP neuron C=0.5": dict(level="neuron", coverage=0.5),
    "SDP block C=0.5": dict(level="block", coverage=0.5),
    "SDP neuron C=0.5, sharding none": dict(level="neuron", coverage=0.5, sharding="none"),
    "SDP block C=0.5, sharding none": dict(level="block", coverage=0.5, sharding="none"),
    "SDP C=1, reshard": dict(coverage=1.0, reshard_after_forward=True),
    "SDP C=1": dict(coverage=1.0),
}
ENGINES = ("DDP", "FSDP2", "FSDP2, no reshard", *SDP_OPTIONS)


class Engine:
    """A model with its optimizer, however it is parallelized. ``step`` is what a training loop does per batch."""

    def __init__(self, name: str, accelerator: SDPAccelerator):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**MODEL, use_cache=False))
        self.name, self.clip = name, clip_grad_norm_
        if name == "DDP":
            model = DistributedDataParallel(model)
        elif name.startswith("FSDP2"):
            for module in (*model.model.layers, model):  # as Accelerate wraps a Llama
                fully_shard(module, reshard_after_forward=name == "FSDP2")
        else:
            patch_model(model, SDPConfig(**SDP_OPTIONS[name]))
            self.clip = accelerator.clip_grad_norm_
        self.model, self.optimizer = model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if name in SDP_OPTIONS:
            self.model, self.optimizer = accelerator.prepare(self.model, self.optimizer)

    def step(self, ids: torch.Tensor) -> None:
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.clip(self.model.parameters(), MAX_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def bytes_of_a_step(self, ids: torch.Tensor) -> int:
        """Bytes this worker sends in one step. Not timed: the counters of DDP and FSDP2 are Python hooks."""
        if self.name == "DDP":
            return _ddp_bytes(self.model.module, ids)
        traffic = self.model._sdp_state.traffic if self.name in SDP_OPTIONS else Traffic(self.model)
        before = traffic.bytes_sent
        self.step(ids)
        return traffic.bytes_sent - before


def _ddp_bytes(model: torch.nn.Module, ids: torch.Tensor) -> int:
    sent = []

    def counted(group, bucket):
        sent.append(2 * (dist.get_world_size() - 1) * bucket.buffer().nbytes // dist.get_world_size())
        return allreduce_hook(group, bucket)

    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, counted)
    wrapped(input_ids=ids, labels=ids).loss.backward()
    return sum(sent)


def expected_bytes(name: str, world_size: int) -> float:
    """By formula: each pass over a tensor (gather, again after resharding, reduce) sends (n-1)/n of it; for SDP
    passes * (C (r-1)/r * maskable + (W-1)/W * shared). No padding."""
    options = SDP_OPTIONS.get(name, dict(coverage=1.0))
    plan = make_plan(LlamaConfig(**MODEL), SDPConfig(**options), world_size)
    maskable, r = plan.full_numel - plan.shared_numel, plan.replication[0]
    passes = 3 if name == "FSDP2" or options.get("reshard_after_forward") else 2
    per_pass = plan.coverage * (r - 1) / r * maskable + (world_size - 1) / world_size * plan.shared_numel
    return passes * 4 * per_pass


def worker(rank: int, folder: str, options: argparse.Namespace) -> None:
    world_size = options.workers
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    accelerator = SDPAccelerator()
    names = [options.profile] if options.profile else ENGINES
    engines = [Engine(name, accelerator) for name in names]
    batches = torch.Generator().manual_seed(rank)

    def batch() -> torch.Tensor:
        return torch.randint(0, MODEL["vocab_size"], (options.tokens // LENGTH, LENGTH), generator=batches)

    for _ in range(options.warmup):
        for engine in engines:
            engine.step(batch())
    if options.profile:
        _profile(engines[0], batch, options.rounds)
    else:
        times = _timed_rounds(engines, batch, options.rounds)
        sent = {engine.name: engine.bytes_of_a_step(batch()) for engine in engines}
        everyone: list = [None] * world_size
        dist.all_gather_object(everyone, (times, sent))
        if rank == 0:
            _report(everyone, options)
    dist.destroy_process_group()


def _timed_rounds(engines: list[Engine], batch, num_rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Per engine and round: seconds passed, and seconds of processor time, of this worker."""
    times: dict[str, list[tuple[float, float]]] = {engine.name: [] for engine in engines}
    for k in range(num_rounds):
        start = k % len(engines)
        for engine in engines[start:] + engines[:start]:
            ids = batch()
            dist.barrier()
            began, cpu_began = time.perf_counter(), time.process_time()
            engine.step(ids)
            times[engine.name].append((time.perf_counter() - began, time.process_time() - cpu_began))
    return times


def _report(everyone: list, options: argparse.Namespace) -> None:
    """Prints the table and writes ``options.output``. ``everyone``: (times, bytes sent) of every worker."""
    rows = {name: _row(name, everyone, options.workers) for name in everyone[0][0]}
    for row in rows.values():
        row["to_ddp"], row["to_fsdp2"] = (row["median_s"] / rows[other]["median_s"] for other in ("DDP", "FSDP2"))
        row["cpu_to_ddp"] = row["cpu_s"] / rows["DDP"]["cpu_s"]
    print(
        "| engine | step, ms (quartiles) | / DDP | / FSDP2 | CPU, ms | CPU / DDP | MiB sent | formula |\n"
        + "| --- " * 8 + "|"
    )  # fmt: skip
    for name, row in rows.items():
        low, high = row["quartiles_s"]
        print(
            f"| {name} | {1e3 * row['median_s']:.0f} ({1e3 * low:.0f}-{1e3 * high:.0f}) | {row['to_ddp']:.2f} | "
            f"{row['to_fsdp2']:.2f} | {1e3 * row['cpu_s']:.0f} | {row['cpu_to_ddp']:.2f} | "
            f"{row['bytes_sent_max'] / 2**20:.2f} | {row['bytes_formula'] / 2**20:.2f} |"
        )
    for one, other in (("SDP C=1, reshard", "FSDP2"), ("SDP C=1", "FSDP2, no reshard")):
        ratio, cpu_ratio = (rows[one][key] / rows[other][key] for key in ("median_s", "cpu_s"))
        print(f"{one} / {other}: {ratio:.3f}, CPU {cpu_ratio:.3f}")
    settings = {key: value for key, value in vars(options).items() if key not in ("output", "profile")}
    if options.output:
        options.output.write_text(json.dumps({"model": MODEL, "settings": settings, "engines": rows}, indent=1))


def _row(name: str, everyone: list, num_workers: int) -> dict:
    rounds = list(zip(*(times[name] for times, _ in everyone), strict=True))
    steps_s = [max(seconds for seconds, _ in workers) for workers in rounds]
    low, _, high = statistics.quantiles(steps_s, n=4)
    return {
        "median_s": statistics.median(steps_s),
        "quartiles_s": [low, high],
        "cpu_s": statistics.median(sum(cpu for _, cpu in workers) for workers in rounds),
        "bytes_sent_max": max(sent[name] for _, sent in everyone),
        "bytes_formula": expected_bytes(name, num_workers),
        "steps_s": steps_s,
    }


def _profile(engine: Engine, batch, num_steps: int) -> None:
    """Prints rank 0's operators by own time a step (waiting included), those of all FSDP2 groups added up."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(num_steps):
            engine.step(batch())
    own_ms, calls = Counter(), Counter()
    for event in profile.key_averages():
        name = event.key.partition(" (")[0]  # "FSDP::all_gather (model.layers.0.mlp)"
        own_ms[name] += event.self_cpu_time_total / 1e3 / num_steps
        calls[name] += event.count / num_steps
    if dist.get_rank() == 0:
        print(
            f"{engine.name}: {own_ms.total():.0f} ms a step\n| operator | own time, ms | share | calls |\n{'| --- ' * 4}|"
        )
        for name, ms in own_ms.most_common(30):
            print(f"| {name} | {ms:.1f} | {ms / own_ms.total():.1%} | {calls[name]:g} |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help=f"per worker and step, a multiple of {LENGTH}")
    parser.add_argument("--rounds", type=int, default=20, help="timed (or profiled) steps of every engine")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--profile", choices=ENGINES, help="profile this engine instead of timing all")
    parser.add_argument("--output", type=Path, help="JSON file for times, bytes and settings")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(worker, args=(folder, options), nprocs=options.workers)


if __name__ == "__main__":
    main()
