"""What hf_sdp knows about a patched model, kept on the model: what it holds, and where its run is.

Both are set by ``patch_model``. What sharding adds is the engine's (``engine/sharded.py``).
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedConfig

from ..config import SDPConfig
from ..errors import SDPConfigError
from ..families.structure import Structure
from ..plan.groups import Group, sharding_groups
from ..plan.placement import Placement, owners
from ..plan.plan import Plan
from ..plan.region import Region
from ..plan.subnetwork import Subnetwork

_ATTRIBUTE = "_sdp_state"


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
        tied: alias -> name in ``plan.shapes`` (tied embeddings).
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
    tied: dict[str, str]

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


@dataclass
class Cursor:
    """Which subnetwork is being trained: this worker's own, or under simulation that of the current micro-batch."""

    subnetwork: int


@dataclass
class Run:
    """Where the training is.

    Attributes:
        cursor: the subnetwork that trains now; moves only under simulation.
        next_micro_batch: under simulation, of the accumulation window.
        version: counts changes of the weights; equal on all workers.
        own_forward: the forward of the model as it is here, of its subnetwork.
        full_forward: the full model's forward in eval mode, a collective; None before the model is sharded.
        replaced: parameters from before patching or sharding -> the local names that took their place.
    """

    cursor: Cursor
    next_micro_batch: int = 0
    version: int = 0
    own_forward: Callable[..., object] | None = None
    full_forward: Callable[..., object] | None = None
    replaced: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)


@dataclass(frozen=True)
class SDPState:
    """Of one patched model."""

    held: Held
    run: Run


def set_state(model: nn.Module, state: SDPState) -> None:
    # Not through nn.Module.__setattr__: the state refers to modules, which must not become children.
    object.__setattr__(model, _ATTRIBUTE, state)


def unwrap(model: nn.Module) -> nn.Module:
    """The model under torch.compile and parallel wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None) or model.__dict__.get("_modules", {}).get("module")
        if inner is None or _ATTRIBUTE in model.__dict__:
            return model
        model = inner


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
