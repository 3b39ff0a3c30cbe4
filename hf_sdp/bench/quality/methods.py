"""What is compared: names such as ``forward-neuron@0.5`` and the models behind them.

A name is ``FAMILY@C``, and of SDP may go on: ``~ORDERk`` deals the units anew every k steps, ``+CHANGE:SHARE`` changes
one thing for the last SHARE of the run's FLOPs. ``/RATE`` is a learning rate of its own.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import set_seed

from ...config import SDPConfig
from ...patch import patch_model
from ...schedule import Phase
from . import baselines
from .setting import Setting

SDP: dict[str, dict[str, Any]] = {
    f"{masking}-{level}{'-linear' * (profile == 'linear')}": dict(masking=masking, level=level, depth_profile=profile)
    for profile in ("uniform", "linear")
    for masking in ("forward", "backward")
    for level in ("neuron", "block")
}
"""Family -> options of ``SDPConfig``; ``-linear`` is the depth profile."""
FAMILIES = {
    "data-parallel": "the full model on every worker",
    **{family: "SDP" for family in SDP},
    "dropout": "the full model; neurons and head outputs dropped with probability 1-C and scaled by 1/C",
    "stochastic-depth": "the full model; each residual block survives with probability C",
    "stochastic-depth-linear": "the same; survival falls linearly with depth, mean C",
    "small": "a narrower model with as many parameters as a subnetwork of coverage C",
}
"""Every family but data-parallel takes a coverage C."""
CHANGES = {value: name for options in SDP.values() for name, value in options.items()}
"""What a later phase may change, beside the coverage -> the option of ``SDPConfig``."""
ORDERS = ("random", "rolling")


@dataclass(frozen=True)
class Redeal:
    """Units are dealt anew every ``every`` steps: permuted at random, or rolled by one unit."""

    order: str
    every: int

    def __str__(self) -> str:
        return f"~{self.order}{self.every}"


@dataclass(frozen=True)
class Change:
    """``to``: a coverage, or a key of ``CHANGES``. ``last``: for which last share of the run's FLOPs."""

    to: float | str
    last: float

    def __str__(self) -> str:
        return f"+{self.to if isinstance(self.to, str) else format(self.to, 'g')}:{self.last:g}"

    @property
    def options(self) -> dict[str, Any]:
        return {CHANGES[self.to]: self.to} if isinstance(self.to, str) else {"coverage": self.to}


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        coverage: None for data parallel alone.
        changes: of the phases after the first, each on top of the one before.
        redeal: None where every subnetwork keeps its units.
        learning_rate: its own; None for that of the setting.
    """

    family: str
    coverage: float | None
    changes: tuple[Change, ...] = field(default=(), kw_only=True)
    redeal: Redeal | None = field(default=None, kw_only=True)
    learning_rate: float | None = field(default=None, kw_only=True)

    @property
    def name(self) -> str:
        coverage = "" if self.coverage is None else f"@{self.coverage:g}"
        rate = "" if self.learning_rate is None else f"/{self.learning_rate:g}"
        return f"{self.family}{coverage}{self.redeal or ''}{''.join(map(str, self.changes))}{rate}"

    def at(self, learning_rate: float | None) -> "Method":
        return dataclasses.replace(self, learning_rate=learning_rate)

    @property
    def is_sdp(self) -> bool:
        return self.family in SDP

    @property
    def treats_workers_alike(self) -> bool:
        """Then one micro-batch of all workers' rows has the gradient of N micro-batches, and is faster."""
        return not self.is_sdp and not self.family.startswith("stochastic-depth")

    def config(self, seed: int) -> SDPConfig:
        """Of SDP: what is held, in which phases."""
        options = dict(SDP[self.family], coverage=self.coverage)
        if not self.changes:
            return SDPConfig(**options, seed=seed)
        phases = [Phase(0.0, **options)]
        for change in self.changes:
            options |= change.options
            if options["coverage"] == 1:
                options["depth_profile"] = "uniform"  # everything is held everywhere
            phases.append(Phase(1 - change.last, **options))
        return SDPConfig(coverage_schedule=phases, coverage_schedule_unit="flops", seed=seed)

    def dense(self, setting: Setting, seed: int) -> nn.Module:
        """The model as it is before it is patched or changed; ``seed`` decides the weights."""
        config = setting.narrowed(self.coverage or 1.0) if self.family == "small" else setting.model_config()
        set_seed(seed)
        return setting.make_model(config)

    def build(self, setting: Setting, seed: int) -> nn.Module:
        """The model to train; ``seed`` also decides the deal of subnetworks and what is skipped at random.

        Raises: SDPConfigError when the coverage cannot be met with this model and number of workers.
        """
        model = self.dense(setting, seed)
        coverage = 1.0 if self.coverage is None else self.coverage
        if self.is_sdp:
            return patch_model(model, dataclasses.replace(self.config(seed), simulate=setting.workers))
        if self.family == "dropout":
            baselines.add_dropout(model, 1 - coverage)
        elif self.family.startswith("stochastic-depth"):
            baselines.skip_at_random(model, coverage, linear=self.family.endswith("-linear"), seed=seed)
        return model
