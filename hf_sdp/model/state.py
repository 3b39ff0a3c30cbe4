"""``SDPState``: what hf_sdp knows about a patched model, kept on the model as ``_sdp_state``."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.weak import WeakTensorKeyDictionary

from ..config import SDPConfig
from ..errors import SDPConfigError
from ..plan.plan import Holders, Part, Plan
from .backward_masking import Cursor

_ATTRIBUTE = "_sdp_state"


@dataclass(frozen=True)
class Held:
    """Which range of which full parameter a local parameter is."""

    name: str
    dim: int
    start: int
    stop: int
    holders: Holders


@dataclass
class LocalPart:
    """A part this worker holds and the local modules that it consists of (block level: the norm and the module)."""

    part: Part
    modules: list[nn.Module]


@dataclass
class SDPState:
    """Everything that is not a parameter.

    Attributes:
        config, plan: as given and as made, equal on all workers.
        rank, world_size: of this worker; it holds subnetwork ``rank % plan.num_subnetworks``.
        model_class, model_name: of the full model.
        full_config: the transformers config of the full model.
        tied: alias -> name in ``plan.shapes`` (tied embeddings).
        local_parts: the parts this worker holds, in the plan's global order (empty under backward masking and
            simulation, where every module keeps its full shape).
        held: local parameter name -> what it is a slice of.
        replaced: parameters from before patching or sharding -> local names that took their place.
        cursor: the subnetwork that trains now; moves only under simulation, with ``next_micro_batch``.
        version: counts changes of the weights; equal on all workers.
        sharded: whether the engine has sharded the model.
        parameters: local name -> sharded parameter (after sharding). The model's own attributes are the gathered
            ones between a forward and its backward.
        dtypes: full parameter name -> dtype (after sharding).
        control_group: gloo group of all workers for small messages (after sharding).
        roll_call: makes sure that all workers come to the same collective (after sharding).
        shadow: the full model for evaluation (after sharding, forward masking).
        traffic: counts the bytes this worker sends (after sharding).
        meter: measures the steps of a Trainer.
        saved_version, saved_weights: the full state dict that rank 0 keeps after training (empty on others), and the
            version it has.
    """

    config: SDPConfig
    plan: Plan
    rank: int
    world_size: int
    model_class: type
    model_name: str
    full_config: Any
    tied: dict[str, str]
    local_parts: list[LocalPart] = field(default_factory=list)
    held: dict[str, Held] = field(default_factory=dict)
    replaced: WeakTensorKeyDictionary = field(default_factory=WeakTensorKeyDictionary)
    cursor: Cursor = field(default_factory=lambda: Cursor(0))
    next_micro_batch: int = 0
    version: int = 0
    sharded: bool = False
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    control_group: Any = None
    roll_call: Any = None
    shadow: Any = None
    traffic: Any = None
    meter: Any = None
    saved_version: int = -1
    saved_weights: dict[str, torch.Tensor] | None = None

    @property
    def saved_weights_are_current(self) -> bool:
        """The same on all workers."""
        return self.saved_weights is not None and self.saved_version == self.version

    @property
    def subnetwork(self) -> int:
        return self.rank % self.plan.num_subnetworks

    @property
    def num_replicas(self) -> int:
        """Workers that hold the same subnetwork: R = world / N."""
        return self.world_size // self.plan.num_subnetworks

    @property
    def simulated(self) -> bool:
        return self.config.simulate is not None

    @property
    def trains_full_forward(self) -> bool:
        """Whether the training forward computes the full model (backward masking, or everything held)."""
        return self.config.masking == "backward" or self.plan.is_full


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


def find_state(model: Any) -> SDPState | None:
    """The state of a patched model (wrapped or not), None for anything else."""
    return unwrap(model).__dict__.get(_ATTRIBUTE) if isinstance(model, nn.Module) else None


def get_state(model: Any) -> SDPState:
    """Raises SDPConfigError when the model is not patched."""
    state = find_state(model)
    if state is None:
        raise SDPConfigError(
            f"{type(model).__name__} is not patched for SDP. Call hf_sdp.patch_model(model, SDPConfig(...)) first."
        )
    return state


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in unwrap(model).modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free gathered parameters, so that the next forward gathers new values. Not from within a forward."""
    for module in fsdp_modules(model):
        module.reshard()


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """This worker's shard of a DTensor; a plain tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
