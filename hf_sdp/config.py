"""``SDPConfig``: everything a user chooses about Subnetwork Data Parallelism."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from . import options
from .errors import SDPConfigError
from .options import option
from .schedule import Phase, phases_of
from .workload import Dtype, Workload

MAX_WORLD = 2**16
"""Workers of a plan. One for more would not be wrong, but would take minutes."""


@dataclass(frozen=True, kw_only=True)
class SDPConfig:
    """What each worker holds, and how it is sharded.

    Checks that need only the values happen here; checks that need the model or the world happen in
    :func:`hf_sdp.make_plan` and :func:`hf_sdp.patch_model`, before anything is changed.

    Raises: SDPConfigError (a ValueError) for a value out of range or an option that would have no effect.
    Source: arXiv 2507.09029, section 3 (forward and backward masking, neuron and block level).
    """

    level: Literal["neuron", "block"] = option(
        "The unit that is held or not held. neuron: groups of MLP neurons, and key/value heads with their query heads. "
        "block: residual blocks with their norms.",
        default="neuron",
    )
    masking: Literal["forward", "backward"] = option(
        "forward: what is not held is absent. backward: the forward is the full model, weight gradients exist for the "
        "held part only.",
        default="forward",
    )
    coverage: float | Sequence[float] = option(
        "Share C of the maskable parameters that a worker holds, in (0, 1]. Times num_subnetworks it must be a whole "
        "number of holders. Several shares are one for each subnetwork.",
        default=0.5,
    )
    memory_gib: Sequence[float] | None = option(
        "Instead of coverage: memory of each subnetwork's worker in GiB (2**30 bytes). The planner finds the shares "
        "that fit, or says how many GiB are missing.",
        default=None,
    )
    coverage_schedule: Sequence[Phase] | None = option(
        "Phases of the training instead of one coverage: [(0.0, 0.5), (0.6, 1.0)] is half of the model, then all "
        "of it. In text 0:0.5,0.6:1. A phase may have a level, masking and depth_profile of its own "
        "(0.6:0.5:masking=backward), gradient_checkpointing, and splits of its micro-batches. memory_gib is then a "
        "limit of each phase.",
        default=None,
    )
    coverage_schedule_unit: Literal["steps", "flops"] = option(
        "Of what the phases of coverage_schedule are shares. flops: of sequences as long as the workload's, without "
        "one as long as the model has positions.",
        default="steps",
    )
    workload: Workload | None = option(
        "What memory_gib has to be enough for, as batch=4,sequence=1024,dtype=bfloat16,optimizer=adamw. Its sequence "
        "also decides FLOPs.",
        default=None,
    )
    min_replication: int = option("Unequal workers: the fewest holders a unit may have.", default=1, positive=True)
    balance: Literal["memory", "compute"] = option(
        "Units that do not divide evenly are dealt so that bytes (memory) or FLOPs (compute) are balanced. With "
        "memory_gib, memory fills each worker, and compute makes the shares as equal as fits.",
        default="memory",
    )
    depth_profile: Literal["uniform", "linear"] = option(
        "Coverage over depth. linear: from C+d in early layers to C-d in late ones, in three steps, with "
        "d = min(C, 1-C)/2; the mean stays the coverage C.",
        default="uniform",
    )
    always_held: Sequence[int] = option(
        "Decoder layers that every worker holds (0: the first, -1: the last). Coverage is of the others.", default=()
    )
    sharding: Literal["full", "none"] = option(
        "full: state is sharded among the holders (FSDP2). none: every holder keeps its slices whole and gradients are "
        "all-reduced; nothing is ever gathered, for slow links.",
        default="full",
    )
    reshard_after_forward: bool = option(
        "As in FSDP2: free the gathered part after forward and gather it again in backward. Less memory, half again as "
        "much traffic.",
        default=False,
    )
    num_subnetworks: int | None = option(
        "Number of different subnetworks N. By default one for each worker. A divisor of the world size makes "
        "replicas.",
        default=None,
        positive=True,
        most=MAX_WORLD,
    )
    block_granularity: Literal["sub-block", "layer"] = option(
        "Block level: attention and MLP are separate units, each with its norm (sub-block), or whole layers are units.",
        default="sub-block",
    )
    evaluate: Literal["full", "subnetwork"] = option(
        "full: evaluate the full model, with collectives in every forward. subnetwork: each worker its own; the metric "
        "is then eval_subnetwork_loss.",
        default="full",
    )
    recalibrate_batches: int | None = option(
        "Models with batch norms: before each evaluation of a Trainer their running statistics are estimated anew for "
        "the full model, from so many batches of training data on each worker. By default they are the means over the "
        "holders.",
        default=None,
        positive=True,
    )
    average_shared_statistics: bool = option(
        "Running statistics of batch norms that all workers hold become the mean over the world. False: those of rank "
        "0, as in DDP. Norms that only some hold are the mean over their holders either way.",
        default=True,
    )
    evaluation_timeout_s: float = option(
        "Seconds that evaluation and saving wait for a worker that does nothing. One that does something else is an "
        "error at once.",
        default=600.0,
        positive=True,
    )
    on_nonfinite: Literal["stop", "skip", "ignore"] = option(
        "When a loss or gradient of any worker is not finite: stop with an error that names the worker, or skip the "
        "step on all of them. ignore: no worker looks. Under fp16 the loss scaler skips.",
        default="stop",
    )
    seed: int = option("Deals the subnetworks. Another seed is another plan with the same balance.", default=0)
    simulate: int | None = option(
        "Number of virtual workers in one process. Micro-batch k of an accumulation window uses subnetwork k mod "
        "simulate.",
        default=None,
        positive=True,
        most=MAX_WORLD,
    )
    param_dtype: Dtype | None = option(
        "FSDP2's mixed precision: dtype of the gathered parameters and of computation. By default as stored. "
        "TrainingArguments(bf16=True) works too.",
        default=None,
    )
    reduce_dtype: Dtype | None = option(
        "FSDP2's mixed precision: dtype of the gradient reduction. By default the gradients' dtype.", default=None
    )

    def __post_init__(self):
        options.check(self)
        self._check_coverage()
        self._check_memory()
        if not _is_list(self.always_held, int):
            raise SDPConfigError(
                f"always_held must be a list of layer indices such as [0, -1], got {self.always_held!r}."
            )
        object.__setattr__(self, "always_held", tuple(self.always_held))
        self._refuse_options_without_effect()
        if self.coverage_schedule is not None:
            object.__setattr__(self, "coverage_schedule", phases_of(self.coverage_schedule))
            self._check_phases()

    def _check_phases(self):
        for phase in self.coverage_schedule or ():
            try:
                self.of_phase(phase)
            except SDPConfigError as error:
                raise SDPConfigError(f"The phase of coverage_schedule from {phase.start:g}: {error}") from None
        for name in ("depth_profile", "always_held"):
            value = getattr(self, name)
            if value != _DEFAULTS[name] and all(getattr(config, name) != value for _, config in self.phases):
                raise SDPConfigError(f"{name}={value!r} has no effect in any phase of coverage_schedule. Leave it out.")

    def of_phase(self, phase: Phase) -> "SDPConfig":
        """The config of a phase's plan, which has no schedule. Raises: SDPConfigError when there is none."""
        values = {**phase.changes, "coverage_schedule": None, "coverage_schedule_unit": "steps", "memory_gib": None}
        if self.balance == "memory":
            values["workload"] = None
        if phase.coverage == 1.0:  # everything is held everywhere
            values |= {name: _DEFAULTS[name] for name in ("depth_profile", "always_held")} | phase.changes
        if values.get("level", self.level) != "block":
            values["block_granularity"] = _DEFAULTS["block_granularity"]
        return dataclasses.replace(self, **values)

    @property
    def phases(self) -> tuple[tuple[Phase, "SDPConfig"], ...]:
        """Each phase of the training with the config of its plan, which has no schedule; without one there is one."""
        if self.coverage_schedule is None:
            return ((Phase(0.0), self),)
        return tuple((phase, self.of_phase(phase)) for phase in self.coverage_schedule)

    def _check_coverage(self):
        shares = _shares(self.coverage)
        if not shares or not _is_list(shares, Real) or any(not 0 < c <= 1 for c in shares):
            raise SDPConfigError(
                f"coverage must be in (0, 1], or a list of such for each subnetwork, got {self.coverage!r}. "
                "1.0 is plain data parallelism (FSDP2)."
            )
        if shares is self.coverage:
            object.__setattr__(self, "coverage", tuple(map(float, shares)))

    def _check_memory(self):
        if isinstance(self.workload, str):
            object.__setattr__(self, "workload", Workload.parse(self.workload))
        if self.workload is not None and not isinstance(self.workload, Workload):
            raise SDPConfigError(f"workload must be a Workload or its text, got {self.workload!r}.")
        if self.memory_gib is None:
            return
        if (
            not _is_list(self.memory_gib, Real)
            or not self.memory_gib
            or not all(options.is_positive(m, float) for m in self.memory_gib)
        ):
            raise SDPConfigError(
                f"memory_gib must list a positive number for each subnetwork, got {self.memory_gib!r}."
            )
        object.__setattr__(self, "memory_gib", tuple(map(float, self.memory_gib)))
        if self.workload is None:
            raise SDPConfigError(
                f"memory_gib={list(self.memory_gib)} needs a workload: what fits depends on the activations. "
                "Use workload=Workload(batch=4, sequence=1024)."
            )
        stored = (self.workload.param_dtype, self.workload.dtype_of_frozen)
        gathered = (self.param_dtype,) if self.param_dtype else stored
        others = [dtype for dtype in gathered if dtype != self.workload.dtype]
        if self.simulate is None and others:
            raise SDPConfigError(
                f"The workload computes in {self.workload.dtype}, parameters would be gathered in {others[0]} "
                f"(param_dtype={self.param_dtype!r}). Use param_dtype={self.workload.dtype!r}, or that dtype in the "
                "workload."
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
        if self.recalibrate_batches is not None and self.evaluate == "subnetwork":
            refuse(
                f"recalibrate_batches={self.recalibrate_batches}",
                "evaluate='subnetwork', which never computes the full model",
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
        if self.coverage_schedule is not None and self.coverage != _DEFAULTS["coverage"]:
            refuse(f"coverage={self.coverage!r}", "coverage_schedule, whose phases have theirs", "Leave it out.")
        if self.coverage_schedule is None and self.coverage_schedule_unit != "steps":
            refuse(f"coverage_schedule_unit={self.coverage_schedule_unit!r}", "coverage_schedule=None", "Leave it out.")
        if self.memory_gib is not None and self.coverage != _DEFAULTS["coverage"]:
            refuse(f"coverage={self.coverage!r}", "memory_gib, which decides the coverage", "Leave one of them out.")
        counts_flops = self.balance == "compute" or self.coverage_schedule_unit == "flops"
        if self.workload is not None and self.memory_gib is None and not counts_flops:
            refuse(f"workload={self.workload}", "memory_gib=None, and nothing that counts FLOPs", "Leave it out.")
        if self.simulate is not None:
            for name in (
                "sharding",
                "reshard_after_forward",
                "num_subnetworks",
                "evaluate",
                "param_dtype",
                "reduce_dtype",
                "on_nonfinite",
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
        return options.arguments(cls, prefix)

    @classmethod
    def from_arguments(cls, arguments: object, prefix: str = "sdp_") -> "SDPConfig":
        """The config from an instance of :meth:`arguments`."""
        return cls(**options.from_arguments(cls, arguments, prefix))


def _shares(coverage) -> Sequence:
    return coverage if _is_list(coverage, Real) else [coverage]


def _is_list(value, element: type) -> bool:
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str | bytes | bytearray)
        and all(isinstance(v, element) and not isinstance(v, bool) for v in value)
    )


_DEFAULTS = {f.name: f.default for f in dataclasses.fields(SDPConfig)}

if __name__ == "__main__":  # python -m hf_sdp.config: the tables of OPTIONS.md
    print(options.markdown(SDPConfig), options.markdown(Workload), sep="\n\n")
