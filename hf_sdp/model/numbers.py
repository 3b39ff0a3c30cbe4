"""Numbers of the full model under its own names, though a worker has slices of it.

Trackers, the index of a checkpoint and model cards take them for the size of the model; FSDP2's parameters say it, too.
"""

import math
from typing import Any

from torch import nn

from ..families.adapters import without_peft
from .packed import full_shape
from .state import FullParameter, get_state, unwrap


def full_parameters(model: nn.Module) -> dict[str, FullParameter]:
    """Of a model that is whole, by the names of ``named_parameters()``."""
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return {
        name: FullParameter(math.prod(full_shape(p)), p.dtype.itemsize, p.requires_grad, name in embeddings)
        for name, p in model.named_parameters()
    }


class CountsFullModel:
    """Mixed into the class of a patched model."""

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As of the full model. This worker's own: :func:`hf_sdp.local_num_parameters`."""
        model: Any = self
        if not get_state(model).held.is_cut:
            return super().num_parameters(only_trainable, exclude_embeddings)  # type: ignore[misc]
        counted = _counted(model, only_trainable, exclude_embeddings)
        return sum(parameter.numel for parameter in counted.values())

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the full model, in the dtypes that it was patched with."""
        model: Any = self
        held = get_state(model).held
        if not held.is_cut:
            return super().get_memory_footprint(return_buffers)  # type: ignore[misc]
        of_parameters = sum(math.prod(held.plan.shapes[name]) * p.itemsize for name, p in held.parameters.items())
        return of_parameters + (sum(buffer.nbytes for buffer in model.buffers()) if return_buffers else 0)


class CountsFullAdapters:
    """Mixed into the class of a model of PEFT around a patched one."""

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Of the full model: how many learn, and all of them."""
        model: Any = without_peft(self)
        if not get_state(model).held.is_cut:
            return super().get_nb_trainable_parameters()  # type: ignore[misc]
        return model.num_parameters(only_trainable=True), model.num_parameters()


def local_num_parameters(model: nn.Module, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """``model.num_parameters()`` of what this worker computes with: its subnetwork, all of it gathered.

    Not collective. Raises: SDPConfigError when the model is not patched.
    """
    held = get_state(model).held
    counted = _counted(unwrap(model), only_trainable, exclude_embeddings)
    regions = (tensor.region for tensor in held.subnetwork.tensors.values() if tensor.region.name in counted)
    return sum(counted[r.name].numel * r.numel // math.prod(held.plan.shapes[r.name]) for r in regions)


def _counted(model: nn.Module, only_trainable: bool, exclude_embeddings: bool) -> dict[str, FullParameter]:
    """By name, as transformers' ``num_parameters`` chooses them.

    What learns is what learns now; of what this worker has nothing, what did when the model was patched.
    """
    held = get_state(model).held
    learns = {name: parameter.learns for name, parameter in held.parameters.items()}
    for local_name, parameter in model.named_parameters():
        learns[held.subnetwork.tensors[local_name].region.name] = parameter.requires_grad
    return {
        name: parameter
        for name, parameter in held.parameters.items()
        if (learns[name] or not only_trainable) and not (exclude_embeddings and parameter.is_embedding)
    }
