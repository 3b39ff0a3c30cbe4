"""``SDPConfig``: everything a user chooses about Subnetwork Data Parallelism."""

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Literal

from .errors import SDPConfigError
from .workload import Workload

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
    coverage: float | Sequence[float] = _option(
        0.5,
        "Share of the maskable parameters that one worker holds, in (0, 1]; or one for each subnetwork.",
    )
    memory_gib: Sequence[float] | None = _option(
        None,
        "Memory of each subnetwork's worker, GiB (2**30 bytes), instead of coverage: each gets what fits. Needs workload.",
    )
    workload: Workload | None = _option(
        None, "What memory_gib has to be enough for: 'batch=4,sequence=1024,dtype=bfloat16,optimizer=adamw'."
    )
    min_replication: int = _option(1, "Unequal workers: the fewest holders a unit may have.")
    balance: Literal["memory", "compute"] = _option(
        "memory", "Units that do not divide evenly are dealt so that bytes (memory) or FLOPs (compute) are balanced."
    )
    depth_profile: Literal["uniform", "linear"] = _option(
        "uniform", "Coverage over depth: uniform, or linear: more of early layers and less of late ones, same mean."
    )
    always_held: Sequence[int] = _option(
        (), "Decoder layers that every worker holds (0: first, -1: last); coverage is of the others."
    )
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
            "balance": ("memory", "compute"),
            "depth_profile": ("uniform", "linear"),
            "param_dtype": (None, *_DTYPES),
            "reduce_dtype": (None, *_DTYPES),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise SDPConfigError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        self._check_coverage()
        self._check_memory()
        if not _is_list(self.always_held, int):
            raise SDPConfigError(
                f"always_held must be a list of layer indices such as [0, -1], got {self.always_held!r}."
            )
        object.__setattr__(self, "always_held", tuple(self.always_held))
        for name in ("num_subnetworks", "simulate", "min_replication"):
            value = getattr(self, name)
            optional = name != "min_replication"
            if not (optional and value is None) and (
                isinstance(value, bool) or not isinstance(value, int) or value < 1
            ):
                raise SDPConfigError(
                    f"{name} must be a positive integer{' or None' if optional else ''}, got {value!r}."
                )
        if not self.evaluation_timeout_s > 0:
            raise SDPConfigError(f"evaluation_timeout_s must be positive, got {self.evaluation_timeout_s!r}.")
        self._refuse_options_without_effect()

    def _check_coverage(self):
        shares = _shares(self.coverage)
        if not shares or any(isinstance(c, bool) or not isinstance(c, Real) or not 0 < c <= 1 for c in shares):
            raise SDPConfigError(
                f"coverage must be in (0, 1], or a list of such for each subnetwork, got {self.coverage!r}. "
                "1.0 is plain data parallelism (FSDP2)."
            )
        if shares is self.coverage:
            object.__setattr__(self, "coverage", tuple(map(float, shares)))

    def _check_memory(self):
        if isinstance(self.workload, str):
            object.__setattr__(self, "workload", Workload.parse(self.workload))
        if self.memory_gib is None:
            return
        if not _is_list(self.memory_gib, Real) or not self.memory_gib or any(not m > 0 for m in self.memory_gib):
            raise SDPConfigError(
                f"memory_gib must list a positive number for each subnetwork, got {self.memory_gib!r}."
            )
        object.__setattr__(self, "memory_gib", tuple(map(float, self.memory_gib)))
        if not isinstance(self.workload, Workload):
            raise SDPConfigError(
                f"memory_gib={list(self.memory_gib)} needs a workload: what fits depends on the activations. "
                "Use workload=Workload(batch=4, sequence=1024)."
            )
        gathered = self.param_dtype or self.workload.param_dtype
        if self.simulate is None and gathered != self.workload.dtype:
            raise SDPConfigError(
                f"The workload computes in {self.workload.dtype}, parameters would be gathered in {gathered} "
                f"(param_dtype={self.param_dtype!r}). Use param_dtype={self.workload.dtype!r}, or that dtype in the workload."
            )

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
        if self.memory_gib is None and set(_shares(self.coverage)) == {1.0}:
            for name in ("depth_profile", "always_held"):
                if getattr(self, name) != _DEFAULTS[name]:
                    refuse(
                        f"{name}={getattr(self, name)!r}",
                        "coverage=1.0: every worker holds everything",
                        "Leave it out.",
                    )
        if self.memory_gib is not None and self.coverage != _DEFAULTS["coverage"]:
            refuse(f"coverage={self.coverage!r}", "memory_gib, which decides the coverage", "Leave one of them out.")
        if self.workload is not None and self.memory_gib is None and self.balance == "memory":
            refuse(f"workload={self.workload}", "memory_gib=None and balance='memory'", "Leave it out.")
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

        Lists are separated by spaces: ``--sdp_coverage 0.75 0.5 0.5 0.25``; one value is that of all subnetworks.
        """
        fields = []
        for f in dataclasses.fields(cls):
            default = {"default": f.default}
            if f.name in ("coverage", "always_held"):  # for a list the parser looks at the factory only
                default = {"default_factory": [f.default].copy if f.name == "coverage" else list}
            fields.append((prefix + f.name, _ARGUMENT_TYPES.get(f.name, f.type), field(**default, metadata=f.metadata)))
        return dataclasses.make_dataclass("SDPArguments", fields)

    @classmethod
    def from_arguments(cls, arguments: "argparse.Namespace | object", prefix: str = "sdp_") -> "SDPConfig":
        """The config from an instance of :meth:`arguments`."""
        values = {f.name: getattr(arguments, prefix + f.name) for f in dataclasses.fields(cls)}
        if len(values["coverage"]) == 1:
            (values["coverage"],) = values["coverage"]
        return cls(**values)


def _shares(coverage) -> Sequence:
    return coverage if _is_list(coverage, Real) else [coverage]


def _is_list(value, element: type) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(v, element) and not isinstance(v, bool) for v in value)
    )


_ARGUMENT_TYPES = {
    "coverage": list[float],
    "memory_gib": list[float] | None,
    "workload": str | None,
    "always_held": list[int],
}  # where HfArgumentParser cannot read a field's own type
_DEFAULTS = {f.name: f.default for f in dataclasses.fields(SDPConfig)}
