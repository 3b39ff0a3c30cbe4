"""What hf_sdp knows about a patched model, kept on the model: what it holds, and where its run is.

Both are set by ``patch_model``. What sharding adds is the engine's (``engine/sharded.py``).
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedConfig

from ..config import SDPConfig
from ..errors import SDPConfigError, SDPStateError
from ..families import Structure
from ..families.adapters import is_adapted, is_peft_model, without_peft
from ..plan.groups import Group, sharding_groups
from ..plan.placement import Placement, owners
from ..plan.plan import Plan
from ..plan.region import Region
from ..plan.subnetwork import Subnetwork
from .phases import Schedule

_ATTRIBUTE = "_sdp_state"


class FullParameter(NamedTuple):
    """What a parameter of the full model was when it was patched.

    Attributes:
        numel: elements; of a packed weight those that it stands for.
        itemsize: bytes of an element as it is stored.
        learns: whether it required a gradient.
        is_embedding: whether it is the weight of an ``nn.Embedding``.
    """

    numel: int
    itemsize: int
    learns: bool
    is_embedding: bool


@dataclass(frozen=True)
class Held:
    """What a worker holds of which model. It never changes.

    Attributes:
        config, plan: as given and as made, equal on all workers.
        rank: of this worker.
        placement: who stores what in this world.
        structure: of the full model.
        subnetwork: what this worker holds, by local names.
        model_class, model_name: of the full model.
        full_config: the transformers config of the full model.
        parameters: of the full model, by name.
        tied: alias -> name in ``plan.shapes`` (tied embeddings).
        adapters: those in use when the model was patched: they train.
    """

    config: SDPConfig
    plan: Plan
    rank: int
    placement: Placement
    structure: Structure
    subnetwork: Subnetwork
    model_class: type
    model_name: str
    full_config: PreTrainedConfig
    parameters: dict[str, FullParameter]
    tied: dict[str, str]
    adapters: frozenset[str]

    @property
    def world_size(self) -> int:
        return self.placement.num_workers

    @property
    def index(self) -> int:
        """Of the subnetwork that this worker holds."""
        return self.rank % self.plan.num_subnetworks

    @property
    def simulated(self) -> bool:
        return self.config.simulate is not None

    @property
    def evaluates_full(self) -> bool:
        """Whether a forward in eval mode is of the full model, while what is trained is cut."""
        return self.config.evaluate == "full" and self.is_cut

    @property
    def is_cut(self) -> bool:
        """Whether this worker's tensors are slices under the names of full parameters."""
        return self.config.masking == "forward" and not self.simulated and not self.plan.is_full

    @property
    def trains_full_forward(self) -> bool:
        """Whether the training forward computes the full model (backward masking, or everything held)."""
        return self.config.masking == "backward" or self.plan.is_full

    @cached_property
    def groups(self) -> list[Group]:
        """What is sharded together, bottom-up."""
        return sharding_groups(self.subnetwork, self.structure)

    @cached_property
    def owners(self) -> dict[str, list[tuple[int, Region]]]:
        """Full parameter name -> who owns which region of it, in the whole world."""
        return owners(self.plan, self.placement)

    def stored(self, local_name: str) -> Region:
        """What this worker stores of a local parameter once the model is sharded (as owner or as replica)."""
        tensor = self.subnetwork.tensors[local_name]
        return self.placement.stored(tensor.region, tensor.holders, self.rank)


def difference(model: nn.Module, held: Held) -> str | None:
    """How the parameters of a model differ from what this worker holds; None when they are the same."""
    found = {name: tuple(p.shape) for name, p in model.named_parameters()}
    expected = {name: tensor.region.shape for name, tensor in held.subnetwork.tensors.items()}
    if found == expected:
        return None
    name = next(n for n in sorted(found.keys() | expected.keys()) if found.get(n) != expected.get(n))
    return f"{name} has shape {found.get(name)}, the plan says {expected.get(name)}."


def refuse_changed(model: nn.Module, held: Held) -> None:
    """Raises SDPStateError when a patched model has other parameters than it was left with."""
    problem = difference(model, held)
    if problem:
        adapters = " (get_peft_model too)" if any(map(is_adapted, model.modules())) else ""
        raise SDPStateError(
            f"The model was changed after it was patched: {problem} Change it before patching{adapters}."
        )


@dataclass
class Cursor:
    """Which subnetwork is being trained: this worker's own, or under simulation that of the current micro-batch.

    A host that knows its micro-batches says which one it is at. Without one, a micro-batch ends when a forward follows
    a backward: several forwards before it, or forwards without gradients, are of the same micro-batch.

    Attributes:
        subnetwork: the one that trains now.
        micro_batch: under simulation, its number within the accumulation window.
        trains: the mode of the model. It decides what is computed: users put single modules in eval mode (batch norms).
    """

    subnetwork: int
    micro_batch: int = 0
    trains: bool = True
    _has_learned: bool = False
    _host_counts: bool = False

    def start(self, micro_batch: int) -> None:
        """Called by a host when a micro-batch begins."""
        self.micro_batch, self._host_counts = micro_batch, True

    def note_gradient(self, gradient: torch.Tensor) -> None:
        """A hook for the gradients of parameters."""
        self._has_learned = True

    def begin_forward(self, num_subnetworks: int) -> None:
        """Of a training forward with gradients, under simulation."""
        if self._has_learned and not self._host_counts:
            self.micro_batch += 1
        self._has_learned = False
        self.subnetwork = self.micro_batch % num_subnetworks


class FullModel(Protocol):
    """The full form of what is cut. The engine has it."""

    def forward(self) -> AbstractContextManager[None]:
        """Around a forward of the model."""

    def form_of(self, module: Any) -> AbstractContextManager[None]:
        """Within it, a module that is cut is the full one. Collective."""

    def cast(self, arguments: Any) -> Any:
        """The arguments of a module in the dtype that it computes in."""

    def release(self) -> None:
        """Forget the weights; the next forward asks for them anew."""


@dataclass
class Run:
    """Where the training is.

    Attributes:
        cursor: the subnetwork that trains now; moves only under simulation.
        evaluates_full: as in ``Held``.
        version: counts changes of the weights; equal on all workers.
        recalibrated: that for which the full model's running statistics were last estimated.
        is_simulated_as_patched: whether a simulation has looked if its parameters are still those of the plan.
        computes: during a forward of the model, what it is of; else None.
        full_model: None before the model is sharded.
        is_sharded: whether the model must be called as a whole.
        replaced: parameters from before patching or sharding -> the local names that took their place.
        hooks: those that a simulation has put on parameters.
    """

    cursor: Cursor
    evaluates_full: bool
    version: int = 0
    recalibrated: int | None = None
    computes: Literal["held", "full"] | None = None
    is_simulated_as_patched: bool = False
    full_model: FullModel | None = None
    is_sharded: bool = False
    replaced: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    hooks: list[RemovableHandle] = field(default_factory=list)


@dataclass(frozen=True)
class SDPState:
    """Of one patched model. ``schedule``: of a model with a ``coverage_schedule``."""

    held: Held
    run: Run
    schedule: Schedule | None = None

    @property
    def config(self) -> SDPConfig:
        """As the user gave it."""
        return self.held.config if self.schedule is None else self.schedule.config


def set_state(model: nn.Module, state: SDPState) -> None:
    # Not through nn.Module.__setattr__: the state refers to modules, which must not become children.
    object.__setattr__(model, _ATTRIBUTE, state)


def unwrap(model: nn.Module) -> nn.Module:
    """The model under torch.compile, parallel wrappers and PEFT."""
    return without_peft(_unwrapped(model))


def find_peft(model: nn.Module) -> Any | None:
    """The model of PEFT (wrapped or not) around a model of transformers; None for anything else."""
    model = _unwrapped(model)
    return model if is_peft_model(model) else None


def _unwrapped(model: nn.Module) -> nn.Module:
    while _ATTRIBUTE not in model.__dict__:
        modules = model.__dict__.get("_modules", {})
        inner = modules.get("_orig_mod") or modules.get("module")
        if inner is None:
            break
        model = inner
    return model


def find_state(model: object) -> SDPState | None:
    """The state of a patched model (wrapped or not), None for anything else."""
    return unwrap(model).__dict__.get(_ATTRIBUTE) if isinstance(model, nn.Module) else None


def get_state(model: object) -> SDPState:
    """Raises SDPConfigError when the model is not patched."""
    state = find_state(model)
    if state is None:
        raise SDPConfigError(
            f"{type(model).__name__} is not patched for SDP. Call hf_sdp.patch_model(model, SDPConfig(...)) first."
        )
    return state


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's shard of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
