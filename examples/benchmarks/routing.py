"""Where tokens go when a worker does not hold all experts: three routings, at equal steps and at equal training FLOPs.

    OMP_NUM_THREADS=1 python examples/benchmarks/routing.py [--text-file FILE] [--output routing.json]

A tiny Qwen3-MoE is trained by virtual workers (``SDPConfig.simulate``), and the full model, with all experts and the
router of transformers, is evaluated on held-out text. In training the router of a worker chooses k experts:

- ``all``: among all. Those that are not held add nothing. This is what hf_sdp does.
- ``held``: the k most probable of the held ones, with their probabilities among all.
- ``held-alone``: the same with their probabilities among the held ones: the logits of the others are minus infinity.

Where the model makes the k weights add up to one (``norm_topk_prob``; Mixtral always does) the last two are the same:
the weights are the softmax of the k logits. They are run as one there.

The last two compute k experts for every token, whatever is held. ``all`` computes the share that is held of them. So a
step of ``all`` costs less, and at equal FLOPs it has more steps; FLOPs are those of the plan (hf_sdp/estimate/PLAN.md).
All runs have one learning rate, chosen for none of them. Text: the source of Python's standard library, or a file.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM, set_seed
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock
from transformers.utils import logging

from hf_sdp import SDPConfig, make_plan, patch_model
from hf_sdp.bench.quality.methods import Method
from hf_sdp.bench.quality.setting import TextSetting, text_name
from hf_sdp.bench.quality.training import train_on_text
from hf_sdp.estimate.figures import plan_figures
from hf_sdp.families.kinds import EXPERTS
from hf_sdp.families.meta_model import meta_model
from hf_sdp.model.mixin import mix_in
from hf_sdp.model.simulation import VirtualExperts

NUM_EXPERTS, TOP_K = 8, 2
EVERYTHING = "data-parallel"
ALL, HELD, HELD_ALONE = ROUTINGS = ("all", "held", "held-alone")


class AmongHeld(nn.Module):
    """Mixed into the class of a router: in training it chooses among what the current subnetwork holds.

    Attributes:
        experts: whose router it is.
        alone: whether probabilities are of the held experts alone.
    """

    experts: VirtualExperts
    alone: bool

    def forward(self, hidden_states):
        logits, weights, index = super().forward(hidden_states)
        if not self.training:
            return logits, weights, index
        held = torch.tensor(self.experts.experts[self.experts.cursor.subnetwork])
        probabilities = logits[:, held].softmax(-1) if self.alone else logits.softmax(-1)[:, held]
        weights, place = probabilities.topk(self.top_k, dim=-1)
        if self.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, held[place]


@dataclass(frozen=True)
class Routed(Method):
    """A mixture of experts. ``family``: a routing, or data parallel. ``renormalized``: the k weights add up to one."""

    renormalized: bool

    @property
    def is_sdp(self) -> bool:
        return self.family in ROUTINGS

    def model_config(self, setting: TextSetting) -> Qwen3MoeConfig:
        return Qwen3MoeConfig(
            vocab_size=setting.vocab_size, hidden_size=setting.hidden_size, max_position_embeddings=setting.sequence,
            moe_intermediate_size=setting.intermediate_size, num_hidden_layers=setting.num_hidden_layers,
            num_attention_heads=setting.num_attention_heads, num_key_value_heads=setting.num_key_value_heads,
            head_dim=setting.hidden_size // setting.num_attention_heads, initializer_range=setting.initializer_range,
            num_experts=NUM_EXPERTS, num_experts_per_tok=TOP_K, norm_topk_prob=self.renormalized, use_cache=False,
        )  # fmt: skip

    def config(self, seed: int) -> SDPConfig:
        return SDPConfig(coverage=self.coverage, seed=seed)

    def dense(self, setting: TextSetting, seed: int) -> nn.Module:
        set_seed(seed)
        return Qwen3MoeForCausalLM(self.model_config(setting))

    def build(self, setting: TextSetting, seed: int) -> nn.Module:
        model = self.dense(setting, seed)
        if self.is_sdp:
            model = patch_model(model, dataclasses.replace(self.config(seed), simulate=setting.workers))
        if self.family in (HELD, HELD_ALONE):
            for block in model.modules():
                if isinstance(block, Qwen3MoeSparseMoeBlock):
                    mix_in(block.gate, AmongHeld)
                    vars(block.gate).update(experts=block.experts, alone=self.family == HELD_ALONE)  # no child
        return model

    def cost(self, setting: TextSetting) -> float:
        """FLOPs of a step, of those of data parallel."""
        config, sdp = self.model_config(setting), SDPConfig(coverage=self.coverage or 1.0)
        figures = plan_figures(
            make_plan(config, sdp, setting.workers), meta_model(config), sdp,
            num_workers=setting.workers, sequence=setting.sequence, element_bytes=4,
        )  # fmt: skip
        flops = {kind: held.mean() for kind, held in figures.flops.items()}
        if self.family in (HELD, HELD_ALONE):
            flops[EXPERTS.name] = figures.full_flops[EXPERTS.name]
        return sum(flops.values()) / sum(figures.full_flops.values())


def wanted(setting: TextSetting, coverage: float, renormalized: bool) -> dict[Routed, tuple[int, int]]:
    """What is compared at one coverage -> its steps at equal steps, and at equal FLOPs: what ``setting.steps`` of
    ``all`` cost."""
    families = (ALL, HELD) if renormalized else ROUTINGS
    chosen = [Routed(EVERYTHING, None, renormalized), *(Routed(family, coverage, renormalized) for family in families)]
    budget = setting.steps * Routed(ALL, coverage, renormalized).cost(setting)
    return {routed: (setting.steps, round(budget / routed.cost(setting))) for routed in chosen}


class Runs:
    """Runs by routing, steps and seed. Each is trained once: it goes to the file when it is done, and is read there."""

    def __init__(self, setting: TextSetting, text_file: str | None, output: Path | None):
        self.setting, self.text_file, self.output = setting, text_file, output
        self.done: dict[tuple[Routed, int, int], dict] = {}
        if output and output.exists():
            stored = json.loads(output.read_text())
            if stored["setting"] != dataclasses.asdict(setting):
                raise SystemExit(f"{output} has runs of another setting: {stored['setting']}")
            for run in stored["runs"]:
                routed = Routed(run["family"], run["coverage"], run["renormalized"])
                self.done[routed, run["steps"], run["seed"]] = run

    def train(self, routed: Routed, steps: int, seed: int, cache: str) -> None:
        if (routed, steps, seed) in self.done:
            return
        setting = dataclasses.replace(self.setting, steps=steps)
        run = train_on_text(routed, seed, setting, self.text_file, cache)
        del run["step_flops"]  # counted with tokens that are all the same, which go to the same experts
        self.done[routed, steps, seed] = {**run, "cost": routed.cost(setting)}
        print(f"{routed}, {steps} steps, seed {seed}: {run['curve'][-1][1]:.4f}, {run['seconds']} s", flush=True)
        if self.output:
            runs = [{**dataclasses.asdict(one), "seed": seed, **run} for (one, _, seed), run in self.done.items()]
            result = {"setting": dataclasses.asdict(self.setting), "runs": runs}
            self.output.write_text(json.dumps(result, indent=1) + "\n")

    def losses(self, routed: Routed, steps: int) -> str:
        """Mean over the seeds, and each."""
        losses = [run["curve"][-1][1] for (one, s, _), run in self.done.items() if (one, s) == (routed, steps)]
        return f"{statistics.mean(losses):.3f} ({', '.join(f'{loss:.3f}' for loss in losses)})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--renormalized", choices=("yes", "no"), nargs="+", default=["yes", "no"])
    parser.add_argument("--coverages", type=float, nargs="+", default=[0.5])
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--text-file")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    setting = TextSetting(
        hidden_size=96, intermediate_size=96, num_hidden_layers=4, vocab_size=512, sequence=64, batch=2, workers=4,
        steps=options.steps, equal="steps", evaluations=1, eval_sequences=512, text=text_name(options.text_file),
        learning_rate=options.learning_rate,
    )  # fmt: skip
    tables = {
        (renormalized, coverage): wanted(setting, coverage, renormalized)
        for coverage in options.coverages
        for renormalized in (choice == "yes" for choice in options.renormalized)
    }
    runs = Runs(setting, options.text_file, options.output)
    with tempfile.TemporaryDirectory() as cache:
        for seed in range(options.seeds):
            for table in tables.values():
                for routed, numbers in table.items():
                    for steps in numbers:
                        runs.train(routed, steps, seed, cache)
    print("| weights add up to one | routing | FLOPs of a step | equal steps | equal FLOPs |\n" + "| --- " * 5 + "|")
    for (renormalized, _), table in tables.items():
        for routed, (steps, fewer) in table.items():
            print(
                f"| {'yes' if renormalized else 'no'} | {routed.name} | {routed.cost(setting):.2f} | "
                f"{runs.losses(routed, steps)} | {fewer}: {runs.losses(routed, fewer)} |"
            )


if __name__ == "__main__":
    main()
