"""Predicted against measured memory of one worker of eight: DDP, FSDP2 and SDP, in settings far apart.

    OMP_NUM_THREADS=1 python examples/benchmarks/estimate_accuracy.py \\
        --output examples/benchmarks/estimate_accuracy.json

Measured as in peak_memory.py: torch's fake process group, the CPU allocator's events of the third step or later. The
peak is parameters and AdamW's moments, DDP's buckets, and the peak of one step above what was allocated before it.
Predicted: ``hf_sdp.estimate.memory``, on the meta device. One process; about half a minute for a setting of the larger
model. With ``--measured estimate_accuracy.json`` what that file has is not measured again, only predicted.

bfloat16 is FSDP2's mixed precision, for DDP autocast. The CPU's bfloat16 matrix products hold their result in float32
for a moment, which the meta device does not show (FORMULAS.md).
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sdp import SDPConfig
from hf_sdp.bench.fake_world import fake_world, measure_steps, parallelize
from hf_sdp.bench.predicted import predicted_step
from hf_sdp.bench.small_llama import small_llama
from hf_sdp.estimate.memory import Step
from hf_sdp.workload import Workload

WORLD_SIZE = 8
MODELS = {
    "97M": dict(vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12),
    "24M deep": dict(
        vocab_size=4096, hidden_size=256, intermediate_size=1024, num_hidden_layers=24, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True,
    ),
}  # fmt: skip
"""The second: deeper, grouped-query attention, tied embeddings."""
BATCHES = [(2, 512), (1, 256)]


@dataclass(frozen=True)
class Setting:
    """``engine``: as in ``hf_sdp.bench.fake_world.parallelize``. ``rank``: the worker that is measured."""

    model: str
    engine: str | SDPConfig
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    rank: int = 0

    @property
    def name(self) -> str:
        words = [self.engine] if isinstance(self.engine, str) else _words(self.engine)
        words += [self.dtype] if self.dtype != "float32" else []
        words += ["gradient checkpointing"] if self.gradient_checkpointing else []
        words += [f"worker {self.rank}"] if self.rank else []
        return ", ".join(words)


def _words(config: SDPConfig) -> list[str]:
    sharding = "none" if config.sharding == "none" else "full"
    words = [f"SDP {config.masking}", config.level, f"C={config.coverage:g}", sharding]
    return [*words, "reshard"] if config.reshard_after_forward else words


def settings() -> list[Setting]:
    large, deep = MODELS
    reshard, none = dict(reshard_after_forward=True), dict(sharding="none")
    bf16 = dict(dtype="bfloat16")
    found = [Setting(large, "DDP"), Setting(large, "FSDP2"), Setting(large, "FSDP2, no reshard")]
    for level, coverage, sharding in (
        ("block", 0.25, {}), ("block", 0.5, reshard), ("block", 0.5, none), ("block", 0.75, {}),
        ("neuron", 0.25, {}), ("neuron", 0.5, reshard), ("neuron", 0.75, none),
    ):  # fmt: skip
        found.append(Setting(large, SDPConfig(level=level, coverage=coverage, **sharding)))
    found.append(Setting(large, SDPConfig(level="block", masking="backward")))
    found.append(Setting(large, "FSDP2", gradient_checkpointing=True))
    found.append(Setting(large, SDPConfig(level="block"), gradient_checkpointing=True))
    found.append(Setting(large, "FSDP2", **bf16))
    found.append(Setting(large, SDPConfig(level="neuron", param_dtype="bfloat16", **reshard), **bf16))
    found += [Setting(deep, engine) for engine in ("DDP", "FSDP2", "FSDP2, no reshard")]
    for level, coverage, sharding, rank in (
        ("block", 0.25, none, 3), ("block", 0.5, {}, 5), ("block", 0.75, reshard, 7),
        ("neuron", 0.25, reshard, 2), ("neuron", 0.5, {}, 6), ("neuron", 0.75, none, 1),
    ):  # fmt: skip
        found.append(Setting(deep, SDPConfig(level=level, coverage=coverage, **sharding), rank=rank))
    found.append(Setting(deep, SDPConfig(level="block", masking="backward", **none), rank=4))
    found.append(Setting(deep, SDPConfig(level="neuron", masking="backward", **reshard)))
    found += [Setting(deep, engine, gradient_checkpointing=True) for engine in ("DDP", "FSDP2, no reshard")]
    found.append(Setting(deep, SDPConfig(level="block"), gradient_checkpointing=True, rank=1))
    found.append(Setting(deep, SDPConfig(level="neuron", **reshard), gradient_checkpointing=True))
    found += [Setting(deep, "DDP", **bf16), Setting(deep, "FSDP2, no reshard", **bf16)]
    found.append(Setting(deep, "DDP", gradient_checkpointing=True, **bf16))
    for level, sharding in (("block", none), ("neuron", {})):
        found.append(Setting(deep, SDPConfig(level=level, param_dtype="bfloat16", **sharding), **bf16, rank=6))
    return found


def model_config(name: str) -> LlamaConfig:
    return small_llama(**MODELS[name])


def predict(setting: Setting, batch: tuple[int, int]) -> Step:
    workload = Workload(
        batch=batch[0],
        sequence=batch[1],
        dtype=setting.dtype,
        gradient_checkpointing=setting.gradient_checkpointing,
    )
    return predicted_step(model_config(setting.model), setting.engine, workload, WORLD_SIZE, setting.rank)


def measure(setting: Setting) -> list[dict[str, int]]:
    """For each batch what ``measure_steps`` says."""
    device = torch.device("cpu")
    model = LlamaForCausalLM(model_config(setting.model))
    if setting.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mixed = setting.dtype != "float32"
    with fake_world(WORLD_SIZE, setting.rank):
        model, optimizer = parallelize(model, setting.engine, device, setting.dtype if mixed else None)
        return measure_steps(model, optimizer, BATCHES, device, autocast=mixed and setting.engine == "DDP")


def measured_rows(setting: Setting) -> list[dict]:
    """One row for each batch."""
    rows = []
    for batch, measured in zip(BATCHES, measure(setting), strict=True):
        row = {"model": setting.model, "setting": setting.name, "batch": f"{batch[0]} x {batch[1]}"}
        for kind in ("parameters", "gradients", "optimizer"):
            row[kind] = {"measured": measured[kind]}
        row["peak"] = {"measured": sum(measured[k] for k in ("parameters", "optimizer", "buckets", "step"))}
        if not isinstance(setting.engine, str):
            row["bytes_sent"] = {"measured": measured["bytes_sent"]}
        rows.append(row)
    return rows


def add_predicted(setting: Setting, rows: list[dict]) -> None:
    for batch, row in zip(BATCHES, rows, strict=True):
        step = predict(setting, batch)
        for kind in ("parameters", "gradients", "optimizer", "peak"):
            row[kind]["predicted"] = getattr(step.memory, kind)
        if "bytes_sent" in row:
            row["bytes_sent"]["predicted"] = step.bytes_sent


def table(rows: list[dict]) -> str:
    """Markdown, MiB."""
    columns = ["model", "setting", "batch", "state", "peak measured", "predicted", "error", "bytes sent"]
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for row in rows:
        state = all(
            row[kind]["measured"] == row[kind]["predicted"] for kind in ("parameters", "gradients", "optimizer")
        )
        sent = row.get("bytes_sent")
        measured, predicted = row["peak"]["measured"], row["peak"]["predicted"]
        cells = [
            *(row["model"], row["setting"], row["batch"], "equal" if state else "DIFFERS"),
            *(f"{measured / 2**20:.1f}", f"{predicted / 2**20:.1f}", f"{predicted / measured - 1:+.2%}"),
            "" if sent is None else "equal" if sent["measured"] == sent["predicted"] else "DIFFERS",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--measured", type=Path, help="earlier JSON file")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args()
    earlier = json.loads(options.measured.read_text()) if options.measured else []
    rows: list[dict] = []
    for setting in settings():
        if setting.model not in options.models:
            continue
        known = [row for row in earlier if (row["model"], row["setting"]) == (setting.model, setting.name)]
        new = known or measured_rows(setting)
        add_predicted(setting, new)
        print(table(new).split("\n", 2)[2], flush=True)
        rows += new
        if options.output:
            options.output.write_text(json.dumps(rows, indent=1))
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
