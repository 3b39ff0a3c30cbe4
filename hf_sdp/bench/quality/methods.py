"""What is compared: names such as ``forward-neuron@0.5`` and the models behind them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import set_seed

from ...config import SDPConfig
from ...errors import SDPConfigError
from ...patch import patch_model
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


@dataclass(frozen=True)
class Method:
    """One row of the comparison. ``coverage`` is None for data parallel alone."""

    family: str
    coverage: float | None

    @property
    def name(self) -> str:
        return self.family if self.coverage is None else f"{self.family}@{self.coverage:g}"

    @property
    def is_sdp(self) -> bool:
        return self.family in SDP

    @property
    def treats_workers_alike(self) -> bool:
        """Then one micro-batch of all workers' rows has the gradient of N micro-batches, and is faster."""
        return not self.is_sdp and not self.family.startswith("stochastic-depth")

    def build(self, setting: Setting, seed: int) -> nn.Module:
        """The model to train; ``seed`` decides weights, deal of subnetworks and what is skipped at random.

        Raises: SDPConfigError when the coverage cannot be met with this model and number of workers.
        """
        coverage = 1.0 if self.coverage is None else self.coverage
        config = setting.narrowed(coverage) if self.family == "small" else setting.model_config()
        set_seed(seed)
        model: nn.Module = setting.make_model(config)
        if self.is_sdp:
            options = SDP[self.family]
            return patch_model(model, SDPConfig(simulate=setting.workers, coverage=coverage, seed=seed, **options))
        if self.family == "dropout":
            baselines.add_dropout(model, 1 - coverage)
        elif self.family.startswith("stochastic-depth"):
            baselines.skip_at_random(model, coverage, linear=self.family.endswith("-linear"), seed=seed)
        return model


def sorted_runs(runs: dict[str, dict]) -> dict[str, dict]:
    """Method name -> its runs, in the order of ``FAMILIES``, then of coverage."""
    families = list(FAMILIES)

    def place(name: str) -> tuple[int, float]:
        family, _, coverage = name.partition("@")
        return families.index(family), float(coverage or 1)

    return {name: runs[name] for name in sorted(runs, key=place)}


def parse_methods(names: Sequence[str], coverages: Sequence[float]) -> list[Method]:
    """Methods from ``FAMILY`` (at each of ``coverages``) or ``FAMILY@COVERAGE``, in this order, each once.

    Raises: SDPConfigError for an unknown family or a coverage that is no share.
    """
    found = []
    for name in names:
        family, _, own = name.strip().partition("@")
        if family not in FAMILIES:
            raise SDPConfigError(
                f"Unknown method {name!r}. Known: {', '.join(FAMILIES)}; with a coverage: forward-block@0.5."
            )
        if family == "data-parallel":
            if own:
                raise SDPConfigError(f"{name!r}: data-parallel has no coverage. Leave it out.")
            found.append(Method(family, None))
            continue
        for text in [own] if own else coverages:
            try:
                coverage = float(text)
            except ValueError:
                raise SDPConfigError(f"{name!r}: {text!r} is no number. Write it as {family}@0.5.") from None
            if not 0 < coverage < 1:
                raise SDPConfigError(f"{name!r}: coverage {coverage:g} must be between 0 and 1; 1 is data-parallel.")
            found.append(Method(family, coverage))
    return list(dict.fromkeys(found))
