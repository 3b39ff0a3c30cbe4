"""Time and memory of planning, by level and number of workers, each in a process of its own.

    OMP_NUM_THREADS=1 python examples/benchmarks/planning.py --output examples/benchmarks/planning.json

Planning is the model on the meta device and make_plan. Memory is the peak of the process above what it had when all
imports were done (an upper bound: the imports' own peak counts as well).
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path


def one(options: argparse.Namespace) -> dict:
    """Plan once, in this process."""
    import numpy as np

    from hf_sdp import SDPConfig, make_plan
    from hf_sdp.cli.models import load_config
    from hf_sdp.estimate.figures import plan_figures
    from hf_sdp.families.meta_model import meta_model
    from hf_sdp.plan.holdings import Holdings
    from hf_sdp.plan.worker_graph import spectral_gap

    (level,), (workers,) = options.levels, options.workers
    meta_model(load_config("llama-134m"))  # imports the family
    model_config, config = load_config(options.model), SDPConfig(level=level, coverage=options.coverage)
    model_config.num_hidden_layers = options.layers
    before_bytes = _resident_bytes()
    began = time.perf_counter()
    model = meta_model(model_config)
    plan = make_plan(model, config, workers)
    planned = time.perf_counter()
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before_bytes
    figures = plan_figures(plan, model, config, num_workers=workers, sequence=1024, element_bytes=2)
    figured = time.perf_counter()
    holdings = Holdings.of(plan)
    numel = np.array([sum(model.get_parameter(name).numel() for name in m.dims) // m.num_units for m in plan.modules])
    gap_began = time.perf_counter()
    gap = spectral_gap(holdings, numel @ holdings.units)
    gap_s = time.perf_counter() - gap_began
    return {
        "level": level,
        "workers": workers,
        "units": len(figures.unit_holders),
        "holder_sets": figures.num_holder_sets,
        "plan_s": planned - began,
        "plan_peak_bytes": peak_bytes,
        "figures_s": figured - planned,
        "spectral_gap": gap,
        "spectral_gap_s": gap_s,
        "process_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-7b", help="a named size, a folder or a config.json")
    parser.add_argument("--layers", type=int, default=128)
    parser.add_argument("--levels", nargs="+", default=["block", "neuron"])
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 512, 4096])
    parser.add_argument("--coverage", type=float, default=0.5)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options)))
        return
    rows = []
    print("| level | workers | units | plan, s | its memory, MiB | all figures, s | spectral gap | of it, s |")
    print("| --- " * 8 + "|")
    for level in options.levels:
        for workers in options.workers:
            arguments = ["--one", "--model", options.model, "--layers", str(options.layers), "--levels", level]
            arguments += ["--workers", str(workers), "--coverage", str(options.coverage)]
            answer = subprocess.run(
                [sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True
            ).stdout
            rows.append(row := json.loads(answer.splitlines()[-1]))
            print(
                f"| {level} | {workers} | {row['units']} | {row['plan_s']:.2f} | "
                f"{row['plan_peak_bytes'] / 2**20:.0f} | {row['figures_s']:.2f} | "
                f"{row['spectral_gap']:.4f} | {row['spectral_gap_s']:.3f} |",
                flush=True,
            )
    if options.output:
        import torch
        import transformers

        settings = {key: getattr(options, key) for key in ("model", "layers", "coverage")}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        versions["transformers"] = transformers.__version__
        threads = os.environ.get("OMP_NUM_THREADS")
        content = {"settings": settings, "versions": versions, "omp_num_threads": threads, "plans": rows}
        options.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
