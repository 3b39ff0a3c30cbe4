"""Memory and FLOPs of one worker of eight on images, measured and predicted: ResNet-18 and Swin-T beside DDP and FSDP2.

    OMP_NUM_THREADS=1 python examples/benchmarks/image_memory.py --output examples/benchmarks/image_memory.json

Measured as in peak_memory.py: torch's fake process group, fp32, fused AdamW, the CPU allocator's events of the third
step. Of worker 0; as workers differ at block level, the peaks of all eight are predicted. FLOPs are counted by torch's
counter in forward and backward of worker 0's model on the CPU, with two images, and multiplied by their number.
Running statistics of batch norms, of which every worker has all (8 bytes a channel), are in none of the figures.
Rows that --output has are not measured again.
"""

import argparse
import copy
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from estimate_accuracy import WORLD_SIZE
from peak_memory import SHARDINGS
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel, ResNetConfig, SwinConfig
from transformers.utils import logging

from hf_sdp import SDPConfig, patch_model
from hf_sdp.bench.fake_world import fake_world, measure_steps, parallelize
from hf_sdp.bench.predicted import predicted_step
from hf_sdp.estimate.batch import training_batch
from hf_sdp.families.attention import set_attention
from hf_sdp.workload import Workload

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """``batch``: images of a worker. ``coverages``: by level, near 0.25, 0.5 and 0.75, such that eight workers can meet
    them; with backward masking the one in the middle."""

    config: PreTrainedConfig
    batch: int
    coverages: dict[str, tuple[float, float, float]]

    def engines(self) -> dict[str, str | SDPConfig]:
        found: dict[str, str | SDPConfig] = {name: name for name in ("DDP", "FSDP2", "FSDP2, no reshard")}
        for masking, level in itertools.product(("forward", "backward"), self.coverages):
            chosen = self.coverages[level]
            for coverage, sharding in itertools.product(chosen if masking == "forward" else chosen[1:2], SHARDINGS):
                name = f"SDP {masking}, {level}, C={coverage:g}, {sharding}"
                found[name] = SDPConfig(masking=masking, level=level, coverage=coverage, **SHARDINGS[sharding])
        return found


CASES = {
    "ResNet-18, 128 of 32x32": Case(  # image_size: the estimate asks for it
        ResNetConfig(layer_type="basic", depths=[2, 2, 2, 2], hidden_sizes=[64, 128, 256, 512], num_labels=10,
                     image_size=32),
        batch=128,
        coverages={"block": (0.375, 0.625, 0.75), "neuron": (0.25, 0.5, 0.75)},  # five blocks can be left out
    ),
    "Swin-T, 32 of 224x224": Case(
        SwinConfig(drop_path_rate=0.0, num_labels=1000),
        batch=32,
        coverages={"block": (0.25, 0.5, 0.75), "neuron": (0.375, 0.5, 0.75)},  # three heads in its first stage
    ),
}  # fmt: skip
STORED = ("parameters", "optimizer", "buckets")


def make_model(config: PreTrainedConfig) -> PreTrainedModel:
    return AutoModelForImageClassification.from_config(copy.deepcopy(config))


def measure(config: PreTrainedConfig, batch: int, engine: str | SDPConfig) -> dict[str, int]:
    """What ``measure_steps`` says, and "flops"."""
    model = make_model(config)
    two, whole = (training_batch(model, number, 1, CPU) for number in (2, batch))
    with fake_world(WORLD_SIZE):
        parallel, optimizer = parallelize(model, engine, CPU)
        # A batch norm does not train with the one image of the steps that come first.
        (row,) = measure_steps(
            parallel, optimizer, [(batch, 1)], CPU, batch_of=lambda number, _: whole if number == batch else two
        )
    model = make_model(config)
    if isinstance(engine, SDPConfig):
        model = patch_model(model, engine, rank=0, world_size=WORLD_SIZE)
    set_attention(model, "eager")  # the counter does not know the CPU's kernel
    with FlopCounterMode(display=False) as counter:
        model(**two).loss.backward()
    return {**row, "flops": counter.get_total_flops() * batch // 2}


def compare(config: PreTrainedConfig, batch: int, engine: str | SDPConfig, measured: dict[str, int]) -> dict:
    """The row of a table, from what was measured."""
    workload = Workload(batch=batch, sequence=1)
    step = predicted_step(config, engine, workload, WORLD_SIZE)
    ranks = range(WORLD_SIZE) if isinstance(engine, SDPConfig) else [0]
    return {
        "measured": measured,
        "peak": {"measured": sum(measured[k] for k in (*STORED, "step")), "predicted": step.memory.peak},
        "flops": {"measured": measured["flops"], "predicted": step.flops},
        "state_equal": (step.memory.parameters, step.memory.optimizer)
        == (measured["parameters"], measured["optimizer"]),
        "predicted_of_workers": [
            predicted_step(config, engine, workload, WORLD_SIZE, rank).memory.peak for rank in ranks
        ],
    }


def table(results: dict[str, dict[str, dict]]) -> str:
    """Markdown; memory in MiB, FLOPs in 10^9."""
    columns = ["model", "engine", "parameters", "moments", "buckets", "step", "peak", "/ DDP", "/ FSDP2", "predicted",
               "error", "of all workers", "GFLOPs", "error"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "| --- | --- " + "| ---: " * (len(columns) - 2) + "|"]
    return "\n".join([*lines, *(line(name, engine, rows) for name, rows in results.items() for engine in rows)])


def line(name: str, engine: str, rows: dict[str, dict]) -> str:
    """Relative to those of ``rows`` that are there."""
    row = rows[engine]
    peak, predicted = row["peak"]["measured"], row["peak"]["predicted"]
    of_workers, flops = row["predicted_of_workers"], row["flops"]
    relative = [f"{peak / rows[other]['peak']['measured']:.2f}" if other in rows else "" for other in ("DDP", "FSDP2")]
    cells = [
        name.partition(",")[0],
        engine,
        *(f"{row['measured'][kind] / 2**20:.0f}" for kind in (*STORED, "step")),
        f"{peak / 2**20:.1f}",
        *relative,
        f"{predicted / 2**20:.1f}" + ("" if row["state_equal"] else " (state differs)"),
        f"{predicted / peak - 1:+.2%}",
        f"{min(of_workers) / 2**20:.0f} to {max(of_workers) / 2**20:.0f}",
        f"{flops['measured'] / 1e9:.1f}",
        f"{flops['predicted'] / flops['measured'] - 1:+.2%}",
    ]
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    logging.set_verbosity_error()
    results = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    for name in options.models:
        config, batch = CASES[name].config, CASES[name].batch
        known = results.pop(name, {})
        rows = results[name] = {}
        for case, engine in CASES[name].engines().items():
            measured = known[case]["measured"] if case in known else measure(config, batch, engine)
            rows[case] = compare(config, batch, engine, measured)
            print(line(name, case, rows), flush=True)
            if options.output:
                options.output.write_text(json.dumps({**results, name: {**known, **rows}}, indent=1) + "\n")
    print(f"\n{table(results)}")


if __name__ == "__main__":
    main()
