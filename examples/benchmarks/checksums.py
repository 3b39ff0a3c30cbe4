"""What the checksums of a checkpoint cost: saving and loading with them and without, in turn.

    OMP_NUM_THREADS=1 python examples/benchmarks/checksums.py --output examples/benchmarks/checksums.json

A Llama of 98 MB of weights (fp32) with AdamW's state, 294 MB in all, 2 workers on one disk. Without: the marker is
written with sizes only, and nothing is compared. Seconds of the slowest worker, median over the rounds; the first round
is left out.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from hf_sdp.bench.small_llama import small_llama
from hf_sdp.bench.workers import launch

NUM_WORKERS = 2


def measure(folder: str, rounds: int) -> list[dict]:
    from transformers import LlamaForCausalLM

    from hf_sdp import SDPAccelerator, SDPConfig, patch_model
    from hf_sdp.checkpoint import marker

    accelerator = SDPAccelerator(cpu=True)
    config = small_llama(
        vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=5, num_attention_heads=8
    )
    model = patch_model(LlamaForCausalLM(config), SDPConfig(coverage=0.5))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    ids = torch.randint(0, 8192, (1, 16))
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    optimizer.zero_grad()

    def seconds(function) -> float:
        dist.barrier()
        began = time.perf_counter()
        function()
        taken = torch.tensor(time.perf_counter() - began)
        dist.all_reduce(taken, op=dist.ReduceOp.MAX)
        return taken.item()

    def size_only(file: Path) -> dict:
        return {"bytes": file.stat().st_size, "crc32": ""}

    without = mock.patch.multiple(marker, fingerprint=size_only, _check_contents=lambda folder, files: None)
    rows = []
    for number in range(rounds + 1):
        for checksums in (True, False) if number % 2 else (False, True):
            with contextlib.nullcontext() if checksums else without:
                save_s = seconds(lambda: accelerator.save_state(folder))
                load_s = seconds(lambda: accelerator.load_state(folder))
            if number:
                rows.append({"checksums": checksums, "save_s": save_s, "load_s": load_s})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        rows = launch(measure, NUM_WORKERS, f"{parent}/state", options.rounds)[0]
        files = [f.stat().st_size for f in Path(parent, "state").rglob("*") if f.is_file()]
    result: dict = {"megabytes": round(sum(files) / 1e6, 1), "rounds": rows}
    for what in ("save_s", "load_s"):
        with_them, without = (
            statistics.median(r[what] for r in rows if r["checksums"] is checksums) for checksums in (True, False)
        )
        result[what] = {"with": round(with_them, 3), "without": round(without, 3)}
        result[what]["percent"] = round(100 * (with_them / without - 1), 1)
        print(what, result[what])
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
