"""Time to find the structure of the largest public shapes, to plan 256 workers, and to cut one worker's subnetwork.

    OMP_NUM_THREADS=1 python examples/benchmarks/largest_shapes.py --output examples/benchmarks/largest_shapes.json

Everything is on the meta device: no weights, one process. Each row is a process of its own, after all imports.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

WORKERS = 256
SHAPES = {
    "Llama-3.1-405B": dict(
        model_type="llama", hidden_size=16384, num_hidden_layers=126, num_attention_heads=128, num_key_value_heads=8,
        intermediate_size=53248, vocab_size=128256, max_position_embeddings=131072,
    ),
    "DeepSeek-V3": dict(
        model_type="deepseek_v3", hidden_size=7168, num_hidden_layers=61, num_attention_heads=128,
        num_key_value_heads=128, intermediate_size=18432, moe_intermediate_size=2048, n_routed_experts=256,
        n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4, first_k_dense_replace=3,
        kv_lora_rank=512, q_lora_rank=1536, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        vocab_size=129280, max_position_embeddings=4096,
    ),
}  # fmt: skip
"""Sizes of their config.json files."""


def one(name: str, level: str) -> dict:
    """Measure in this process."""
    from transformers import CONFIG_MAPPING

    from hf_sdp import SDPConfig, make_plan
    from hf_sdp.families import cuts_of, structure_of
    from hf_sdp.families.meta_model import meta_model
    from hf_sdp.patch import patch_meta_model

    sizes = dict(SHAPES[name])
    cls = CONFIG_MAPPING[sizes.pop("model_type")]
    meta_model(cls(**{**sizes, "num_hidden_layers": 1}))  # imports its module
    config, sdp = cls(**sizes), SDPConfig(level=level, coverage=0.5)
    times = [time.perf_counter()]

    def passed() -> float:
        times.append(time.perf_counter())
        return round(times[-1] - times[-2], 2)

    model = meta_model(config)
    row = {"model": name, "level": level, "parameters": sum(p.numel() for p in model.parameters()), "model_s": passed()}
    structure_of(model)
    if level == "neuron":
        cuts_of(model)
    row["structure_s"] = passed()
    plan = make_plan(model, sdp, WORKERS)
    row |= {"plan_s": passed(), "holder_sets": len(plan.holder_sets), "coverage": round(plan.coverage, 4)}
    patch_meta_model(model, sdp, rank=0, world_size=WORKERS)
    row["patch_s"] = passed()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(*options.one)))
        return
    rows = []
    print("| model | level | model, s | structure, s | plan, s | patch (plans once more), s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name in SHAPES:
        for level in ("block", "neuron"):
            command = [sys.executable, __file__, "--one", name, level]
            ran = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600)
            row = json.loads(ran.stdout.splitlines()[-1])
            rows.append(row)
            print(
                "|",
                " | ".join(str(row[key]) for key in ("model", "level", "model_s", "structure_s", "plan_s", "patch_s")),
                "|",
            )
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
