"""Step time and bytes sent: DDP, FSDP2 and SDP side by side in the same processes, over gloo on CPU.

    python examples/benchmarks/step_time.py                                  # 4 workers, writes step_time.json
    python examples/benchmarks/step_time.py --profile "SDP neuron C=0.5"     # where the time of a step goes

All engines are stepped in turn, as `hf-sdp compare` does (hf_sdp/bench/compare/measure.py), which also splits the step,
measures memory, and limits bandwidth; here are the engines that show what SDP adds to FSDP2 at coverage 1. A step's
time is that of the slowest worker, median over the rounds. "CPU" is the processor time that all workers spent on it
together, which other programs on the machine disturb least. One thread a worker. Llama of 6.85 M parameters, fp32,
random tokens.

Bytes are counted as a ring sends them (hf_sdp/engine/traffic.py); gloo's reduce-scatter is an all-reduce inside.
"""

import argparse
import json
import statistics
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist

from hf_sdp import SDPConfig
from hf_sdp.bench.compare.contenders import Contender, Workplace, expected_bytes
from hf_sdp.bench.compare.measure import timed_rounds
from hf_sdp.bench.compare.run import summary
from hf_sdp.bench.small_llama import small_llama
from hf_sdp.bench.workers import launch

LENGTH = 128
MODEL = dict(
    vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=LENGTH,
)  # fmt: skip
ENGINES = {
    "DDP": None,
    "FSDP2": None,
    "FSDP2, no reshard": None,
    "SDP neuron C=0.5": SDPConfig(level="neuron", coverage=0.5),
    "SDP block C=0.5": SDPConfig(level="block", coverage=0.5),
    "SDP neuron C=0.5, sharding none": SDPConfig(level="neuron", coverage=0.5, sharding="none"),
    "SDP block C=0.5, sharding none": SDPConfig(level="block", coverage=0.5, sharding="none"),
    "SDP C=1, reshard": SDPConfig(coverage=1.0, reshard_after_forward=True),
    "SDP C=1": SDPConfig(coverage=1.0),
}


def worker(workplace: Workplace, options: argparse.Namespace) -> tuple | str | None:
    """What this worker measured: samples and bytes sent of every engine; with ``--profile`` its table."""
    names = [options.profile] if options.profile else list(ENGINES)
    engines = [Contender(name, ENGINES[name], workplace) for name in names]
    if options.profile:
        timed_rounds(engines, workplace, rounds=0, warmup=options.warmup, silent=False)
        return _profile(engines[0], workplace, options.rounds)
    samples = timed_rounds(engines, workplace, options.rounds, options.warmup, silent=False)
    ids, sent = workplace.random_ids(torch.Generator().manual_seed(0)), {}
    for engine in engines:
        before = engine.traffic.bytes_sent
        engine.step(ids)
        sent[engine.name] = engine.traffic.bytes_sent - before
    return samples, sent


def _report(everyone: list, workplace: Workplace, options: argparse.Namespace) -> None:
    """Prints the table and writes ``options.output``. ``everyone``: what every worker measured."""
    rows = {name: _row(name, everyone, workplace) for name in ENGINES}
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


def _row(name: str, everyone: list, workplace: Workplace) -> dict:
    measured = summary([samples[name] for samples, _ in everyone])
    low, _, high = statistics.quantiles(measured["steps_s"], n=4)
    return {
        "median_s": measured["step_s"],
        "quartiles_s": [low, high],
        "cpu_s": measured["cpu_s"],
        "bytes_sent_max": max(sent[name] for _, sent in everyone),
        "bytes_formula": expected_bytes(name, ENGINES[name], workplace.model, workplace.workers),
        "steps_s": measured["steps_s"],
    }


def _profile(engine: Contender, workplace: Workplace, num_steps: int) -> str:
    """This worker's operators by own time a step (waiting included), those of all FSDP2 groups added up."""
    ids = workplace.random_ids(torch.Generator().manual_seed(dist.get_rank()))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(num_steps):
            engine.step(ids)
    own_ms, calls = Counter(), Counter()
    for event in profile.key_averages():
        name = event.key.partition(" (")[0]  # "FSDP::all_gather (model.layers.0.mlp)"
        own_ms[name] += event.self_cpu_time_total / 1e3 / num_steps
        calls[name] += event.count / num_steps
    lines = [
        f"{engine.name}: {own_ms.total():.0f} ms a step",
        "| operator | own time, ms | share | calls |",
        "| --- " * 4 + "|",
    ]
    for name, ms in own_ms.most_common(30):
        lines.append(f"| {name} | {ms:.1f} | {ms / own_ms.total():.1%} | {calls[name]:g} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024, help=f"per worker and step, a multiple of {LENGTH}")
    parser.add_argument("--rounds", type=int, default=20, help="timed (or profiled) steps of every engine")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--profile", choices=ENGINES, help="profile this engine instead of timing all")
    parser.add_argument("--output", type=Path, help="JSON file for times, bytes and settings")
    options = parser.parse_args()
    config = small_llama(**MODEL)
    workplace = Workplace(model=config, workers=options.workers, batch=options.tokens // LENGTH, sequence=LENGTH)
    measured = launch(worker, options.workers, workplace, options)
    if options.profile:
        print(measured[0])
    else:
        _report(measured, workplace, options)


if __name__ == "__main__":
    main()
