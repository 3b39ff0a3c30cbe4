"""Loss of the full model over time and over bytes sent: simulated curves, and measured steps.

    OMP_NUM_THREADS=1 python examples/quality/time_to_loss.py measure     # as root; writes time_to_loss.json
    python examples/quality/time_to_loss.py plot                          # writes time_to_loss.png, prints the table

The curves are those of the comparison of quality (``hf-sdp simulate``), mean over the seeds: how many steps a method
takes to which loss. A step's time and bytes are measured with 4 workers on a larger model, since steps of the small
one are mostly overhead: all engines in turn, without a limit and at 1 Gbit/s a link. All is relative to a step of DDP.
So the plot says what the curves would cost at the larger model's steps, not what a training has taken.
"""

import argparse
import contextlib
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hf_sdp import SDPConfig
from hf_sdp.bench.compare.contenders import Contender, Workplace
from hf_sdp.bench.compare.measure import timed_rounds
from hf_sdp.bench.compare.run import summary
from hf_sdp.bench.network import limited_network
from hf_sdp.bench.quality.baselines import narrowed
from hf_sdp.bench.quality.sweep import at_best_rates
from hf_sdp.bench.small_llama import small_llama
from hf_sdp.bench.workers import launch
from hf_sdp.quantities import bits_per_second

FOLDER = Path(__file__).parent
WORKERS, BATCH, LENGTH = 4, 8, 128
MODEL = dict(
    vocab_size=1024, hidden_size=256, intermediate_size=688, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=8, max_position_embeddings=LENGTH,
)  # fmt: skip
HALF, WHOLE, SMALL = "SDP, linear, C=0.5", "SDP, C=1", "DDP, small"
ENGINES = {
    "DDP": None,
    "FSDP2": None,
    HALF: SDPConfig(depth_profile="linear", coverage=0.5),
    WHOLE: SDPConfig(coverage=1.0),
    SMALL: None,
}
LINKS = {"no limit": None, "1 Gbit/s": "1Gbit"}
LINES = {  # what is drawn: the method's name in the results, and the engine of each of its phases
    "DDP": ("data-parallel", ["DDP"]),
    "FSDP2": ("data-parallel", ["FSDP2"]),
    "small model, DDP": ("small@0.5", [SMALL]),
    "SDP, the recipe": ("forward-neuron-linear@0.5+1:0.6", [HALF, WHOLE]),
}


def work(workplaces: dict[str, Workplace], rounds: int) -> tuple[dict, dict[str, int]]:
    """Samples of each engine, and bytes that this worker sends in a step."""
    engines = [Contender(name, sdp, workplaces[name]) for name, sdp in ENGINES.items()]
    samples = timed_rounds(engines, workplaces["DDP"], rounds, 2, silent=False)
    sent = {}
    for engine in engines:
        before = engine.traffic.bytes_sent
        engine.step(workplaces["DDP"].random_ids(torch.Generator().manual_seed(0)))
        sent[engine.name] = engine.traffic.bytes_sent - before
    return samples, sent


def measure(rounds: int) -> dict:
    config = small_llama(**MODEL)
    of_config = dict(workers=WORKERS, batch=BATCH, sequence=LENGTH)
    workplaces = {name: Workplace(model=config, **of_config) for name in ENGINES}
    workplaces[SMALL] = Workplace(model=narrowed(config, 0.5, 8), **of_config)
    found: dict = {"rounds": rounds, "workers": WORKERS, "tokens": BATCH * LENGTH, "model": MODEL, "step_s": {}}
    for link, bandwidth in LINKS.items():
        network = limited_network(WORKERS, bits_per_second(bandwidth)) if bandwidth else contextlib.nullcontext()
        with network as namespaces:
            everyone = launch(work, WORKERS, workplaces, rounds, namespaces=namespaces)
        measured = {name: summary([samples[name] for samples, _ in everyone]) for name in ENGINES}
        found["step_s"][link] = {name: measured[name]["step_s"] for name in ENGINES}
        found["bytes_sent"] = {name: max(sent[name] for _, sent in everyone) for name in ENGINES}
    return found


def runs_of(results: dict, method: str) -> list[dict]:
    """At its best learning rate."""
    return list(at_best_rates(results["runs"])[method].values())


def costs(run: dict, of_phases: Sequence[float]) -> np.ndarray:
    """What a run has cost at each of its evaluations. ``of_phases``: a step of each phase."""
    firsts = [first for first, _ in run.get("phases", [[0, 0]])]
    steps = np.array([step for step, _ in run["curve"]], dtype=float)
    total = np.zeros_like(steps)
    for first, end, cost in zip(firsts, [*firsts[1:], np.inf], of_phases, strict=True):
        total += np.clip(steps - first, 0, end - first) * cost
    return total


def cost_of_loss(cost: np.ndarray, losses: np.ndarray, wanted: float) -> float | None:
    """At which the curve first comes to a loss, between two evaluations on a line; None when it never does."""
    for index in range(1, len(losses)):
        if losses[index] <= wanted:
            share = (losses[index - 1] - wanted) / (losses[index - 1] - losses[index])
            return float(cost[index - 1] + share * (cost[index] - cost[index - 1]))
    return None


def plot(results: dict, measured: dict, output: Path) -> list[str]:
    """Draws, and returns the lines of a table."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    units = {f"time, {link}": step_s for link, step_s in measured["step_s"].items()}
    units["bytes sent by a worker"] = measured["bytes_sent"]
    figure, axes = pyplot.subplots(1, len(units), figsize=(5 * len(units), 4), sharey=True)
    wanted = statistics.mean(run["curve"][-1][1] for run in runs_of(results, "data-parallel"))
    rows = [
        "| to data parallel's final loss, of DDP's cost | " + " | ".join(units) + " |",
        "| --- " + "| ---: " * 3 + "|",
    ]
    cells: dict[str, list[str]] = {name: [] for name in LINES}
    for axis, (title, of_engine) in zip(axes, units.items(), strict=True):
        whole = costs(runs_of(results, "data-parallel")[0], [of_engine["DDP"]])[-1]
        for name, (method, engines) in LINES.items():
            runs = runs_of(results, method)
            cost = costs(runs[0], [of_engine[engine] for engine in engines]) / whole
            losses = np.mean([[loss for _, loss in run["curve"]] for run in runs], axis=0)
            axis.plot(cost, losses, marker="o", markersize=3, label=f"{name} ({len(runs)} seeds)")
            reached = cost_of_loss(cost, losses, wanted)
            cells[name].append("not reached" if reached is None else f"{reached:.2f}")
        axis.axhline(wanted, color="gray", linewidth=0.5)
        axis.set_xlabel(f"{title}, of DDP's whole run")
    axes[0].set_ylabel("loss of the full model")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(output, dpi=120)
    return rows + [f"| {name} | " + " | ".join(of_name) + " |" for name, of_name in cells.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "plot"])
    parser.add_argument("--rounds", type=int, default=8, help="timed steps of every engine")
    parser.add_argument("--results", type=Path, default=FOLDER / "10_tokens" / "results.json", help="the curves")
    parser.add_argument("--steps", type=Path, default=FOLDER / "time_to_loss.json", help="the measured steps")
    parser.add_argument("--picture", type=Path, default=FOLDER / "time_to_loss.png")
    options = parser.parse_args()
    if options.what == "measure":
        options.steps.write_text(json.dumps(measure(options.rounds), indent=1) + "\n")
        return
    results, measured = json.loads(options.results.read_text()), json.loads(options.steps.read_text())
    print("\n".join(plot(results, measured, options.picture)))


if __name__ == "__main__":
    main()
