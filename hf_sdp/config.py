"""``SDPConfig``: everything a user chooses about Subnetwork Data Parallelism."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from .errors import SDPConfigError

_DTYPES = ("float32", "bfloat16", "float16")


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class SDPConfig:
    """What each worker holds, and how it is sharded.

    Checks that need only the values happen here; checks that need the model or the world happen in
    :func:`hf_sdp.make_plan` and :func:`hf_sdp.patch_model`, before anything is changed.

    Raises: SDPConfigError (a ValueError) for a value out of range or an option that would have no effect.
    Source: arXiv 2507.09029, section 3 (forward and backward masking, neuron and block level).
    """

    level: Literal["neuron", "block"] = _option(
        "neuron", "Unit that is held or not held: groups of MLP neurons and key/value heads, or residual blocks."
    )
    masking: Literal["forward", "backward"] = _option(
        "forward",
        "forward: what is not held is absent; backward: full forward, weight gradients of the held part only.",
    )
    coverage: float = _option(0.5, "Share of the maskable parameters that one worker holds, in (0, 1].")
    sharding: Literal["full", "none"] = _option(
        "full", "full: FSDP2 among the holders; none: every holder keeps the whole slice (gradients are all-reduced)."
    )
    reshard_after_forward: bool = _option(False, "Free the gathered part after forward and gather again in backward.")
    num_subnetworks: int | None = _option(
        None, "Different subnetworks N; default: the world size, which N must divide."
    )
    block_granularity: Literal["sub-block", "layer"] = _option(
        "sub-block", "Block level: attention and MLP (each with its norm) are separate units, or whole layers are."
    )
    evaluate: Literal["full", "subnetwork"] = _option(
        "full", "Evaluate the full model (a collective in every forward), or each worker's own subnetwork."
    )
    evaluation_timeout_s: float = _option(
        600.0,
        "Seconds that evaluation and saving wait for a worker that does nothing; one that does something else is an error at once.",
    )
    seed: int = _option(0, "Deals the subnetworks: another seed, another plan with the same balance.")
    simulate: int | None = _option(
        None, "Virtual workers in one process; micro-batch k of an accumulation window uses subnetwork k mod simulate."
    )
    param_dtype: Literal["float32", "bfloat16", "float16"] | None = _option(
        None, "FSDP2 mixed precision: dtype of the gathered parameters (computation). Default: as stored."
    )
    reduce_dtype: Literal["float32", "bfloat16", "float16"] | None = _option(
        None, "FSDP2 mixed precision: dtype of the gradient reduction. Default: the gradients' dtype."
    )

    def __post_init__(self):
        choices = {
            "level": ("neuron", "block"),
            "masking": ("forward", "backward"),
            "sharding": ("full", "none"),
            "block_granularity": ("sub-block", "layer"),
            "evaluate": ("full", "subnetwork"),
            "param_dtype": (None, *_DTYPES),
            "reduce_dtype": (None, *_DTYPES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SDPConfigError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if isinstance(self.coverage, bool) or not isinstance(self.coverage, (int, float)) or not 0 < self.coverage <= 1:
            raise SDPConfigError(
                f"coverage must be in (0, 1], got {self.coverage!r}. 1.0 is plain data parallelism (FSDP2)."
            )
        for name in ("num_subnetworks", "simulate"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise SDPConfigError(f"{name} must be a positive integer or None, got {value!r}.")
        if not self.evaluation_timeout_s > 0:
            raise SDPConfigError(f"evaluation_timeout_s must be positive, got {self.evaluation_timeout_s!r}.")
        self._refuse_options_without_effect()

    def _refuse_options_without_effect(self):
        def refuse(option: str, because: str, remedy: str):
            raise SDPConfigError(f"{option} has no effect with {because}. {remedy}")

        if self.block_granularity != "sub-block" and self.level != "block":
            refuse(f"block_granularity={self.block_granularity!r}", f"level={self.level!r}", "Use level='block'.")
        if self.reshard_after_forward and self.sharding == "none":
            refuse(
                "reshard_after_forward=True",
                "sharding='none', which gathers nothing",
                "Use sharding='full' or leave it False.",
            )
        if self.evaluate == "subnetwork" and self.masking == "backward":
            refuse(
                "evaluate='subnetwork'",
                "masking='backward', whose forward is always the full model",
                "Use evaluate='full'.",
            )
        if self.simulate is not None:
            for name in (
                "sharding",
                "reshard_after_forward",
                "num_subnetworks",
                "evaluate",
                "param_dtype",
                "reduce_dtype",
            ):
                if getattr(self, name) != _DEFAULTS[name]:
                    refuse(
                        f"{name}={getattr(self, name)!r}",
                        f"simulate={self.simulate} (one process holds the full model)",
                        f"Leave {name} at its default {_DEFAULTS[name]!r}.",
                    )

    @classmethod
    def arguments(cls, prefix: str = "sdp_") -> type:
        """A dataclass with the same fields under prefixed names (``--sdp_level`` ...) for ``HfArgumentParser``.

        ``SDPConfig`` itself also works there; the prefix keeps its options apart from ``TrainingArguments``.
        """
        fields = [
            (prefix + f.name, f.type, field(default=f.default, metadata=f.metadata)) for f in dataclasses.fields(cls)
        ]
        return dataclasses.make_dataclass("SDPArguments", fields)

    @classmethod
    def from_arguments(cls, arguments: "argparse.Namespace | object", prefix: str = "sdp_") -> "SDPConfig":
        """The config from an instance of :meth:`arguments`."""
        return cls(**{f.name: getattr(arguments, prefix + f.name) for f in dataclasses.fields(cls)})


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(SDPConfig)}
