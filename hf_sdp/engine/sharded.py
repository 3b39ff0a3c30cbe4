"""``Sharded``: what the engine knows about a model that it has sharded, kept on the model."""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from ..compat import is_forgotten
from ..errors import SDPStateError
from ..model.state import Held, Run, get_state, local_tensor, unwrap
from ..plan.region import Region
from ..world import groups
from ..world.roll_call import RollCall
from .traffic import Traffic

_ATTRIBUTE = "_sdp_sharded"


@dataclass
class Sharded:
    """Of one sharded model.

    Attributes:
        held, run: as in its ``SDPState``.
        parameters: local name -> sharded parameter. The model's own attributes are the gathered ones between a forward
            and its backward.
        dtypes: full parameter name -> dtype, also of parameters of which this worker holds nothing.
        traffic: counts the bytes that this worker sends.
        roll_call: makes sure that all workers come to the same collective; None without real communication.
        on_change: called when weights have changed.
        has_new_statistics: whether batch norms have seen batches since their statistics were averaged; the same on all
            workers.
        stepped: the optimizers that have taken a step since a ``coverage_schedule`` was last followed.
    """

    held: Held
    run: Run
    parameters: dict[str, nn.Parameter]
    dtypes: dict[str, torch.dtype]
    traffic: Traffic
    roll_call: RollCall | None
    on_change: list[Callable[[], None]] = field(default_factory=list)
    has_new_statistics: bool = False
    stepped: WeakSet[torch.optim.Optimizer] = field(default_factory=WeakSet)

    def __post_init__(self) -> None:
        self._learners = {name for name, p in self.parameters.items() if p.requires_grad}

    def refuse_other_learners(self) -> None:
        """Raises SDPStateError when what is frozen is not what it was: FSDP2 would go on with what it has seen."""
        changed = self._learners ^ {name for name, p in self.parameters.items() if p.requires_grad}
        if changed:
            name = min(changed)
            raise SDPStateError(
                f"{len(changed)} parameters were frozen or unfrozen after the model was prepared, {name} among them: "
                f"requires_grad={self.parameters[name].requires_grad}. Do it before (set_adapter and add_adapter of "
                "PEFT too), or train anew from a checkpoint."
            )

    @property
    def control_group(self) -> dist.ProcessGroup | None:
        """The gloo group of all workers for small messages; None without real communication."""
        return groups.control_group()

    def weights_changed(self) -> None:
        """To be called by all workers after any change of the weights."""
        self.run.version += 1
        for forget in self.on_change:
            forget()

    @property
    def full_bytes(self) -> int:
        """Of the full model's parameters, tied ones once; the same on all workers."""
        return sum(math.prod(shape) * self.dtypes[name].itemsize for name, shape in self.held.plan.shapes.items())

    def checksum(self) -> int:
        """CRC-32 of what this worker stores: it changes with every write, also with one that torch does not notice."""
        crc = 0
        for _, tensor in self.stored():
            copy = tensor.cpu().clone(memory_format=torch.contiguous_format)  # after .numpy() it could not be freed
            crc = zlib.crc32(copy.view(torch.uint8).numpy().data, crc)
        return crc

    def stored(self) -> Iterator[tuple[Region, torch.Tensor]]:
        """What this worker stores: each region with the tensor that has it."""
        for local_name, parameter in self.parameters.items():
            yield self.held.stored(local_name), local_tensor(parameter.detach())


def refuse_parameters_of_before(parameters: Iterable[torch.Tensor], models: Iterable[Sharded]) -> None:
    """Raises SDPStateError for sharded parameters that are of none of these models: of one before its phase began."""
    ours = {id(p) for sharded in models for p in sharded.parameters.values()}
    if any(isinstance(p, DTensor) and id(p) not in ours for p in parameters):
        raise _of_before()


def refuse_forgotten(tensors: Iterable[torch.Tensor]) -> None:
    """Raises SDPStateError for parameters whose values went on to the next phase of their model."""
    if any(map(is_forgotten, tensors)):
        raise _of_before()


def _of_before() -> SDPStateError:
    return SDPStateError(
        "These parameters are not the model's any more: a phase of its coverage_schedule has begun. Take "
        "model.parameters() again, and give follow_schedule all optimizers that train the model."
    )


def weights_changed(model: nn.Module) -> None:
    """Say that parameters of a prepared model were written to, other than by its optimizer. Call it on all workers.

    Evaluation asks for the weights anew whenever ``model.eval()`` or ``model.train()`` was called, and saving always
    does. This is for a write between two evaluations of a loop of your own.
    Raises: SDPStateError before the model is prepared.
    """
    get_sharded(model, "weights_changed").weights_changed()


def set_sharded(model: nn.Module, sharded: Sharded) -> None:
    object.__setattr__(model, _ATTRIBUTE, sharded)


def find_sharded(model: object) -> Sharded | None:
    """Of a sharded model (wrapped or not), None for anything else."""
    return unwrap(model).__dict__.get(_ATTRIBUTE) if isinstance(model, nn.Module) else None


def get_sharded(model: object, what: str) -> Sharded:
    """Raises: SDPStateError that says that ``what`` needs a prepared model, when it is not sharded."""
    sharded = find_sharded(model)
    if sharded is None:
        raise SDPStateError(f"{what} needs a prepared model: no other worker's slices are known yet.")
    return sharded


def control_group(model: object) -> dist.ProcessGroup | None:
    """The group for small messages about a model; None for the default group."""
    sharded = find_sharded(model)
    return None if sharded is None else sharded.control_group


def stored_tensors(model: nn.Module) -> Iterator[tuple[Region, torch.Tensor]]:
    """What this worker stores of a patched model, sharded or not: each region with the tensor that has it."""
    sharded = find_sharded(model)
    if sharded is not None:
        yield from sharded.stored()
        return
    tensors = get_state(model).held.subnetwork.tensors
    for local_name, parameter in unwrap(model).named_parameters():
        yield tensors[local_name].region, parameter.detach()
