"""The one place that knows of differences between supported versions and of names the hosts do not export.

Supported: torch >= 2.11, transformers >= 5.17, accelerate >= 1.12.
"""

import contextlib
import functools
import gc
import importlib.metadata
import inspect
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from torch import nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store as default_store
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import DataParallelMeshInfo
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from transformers.conversion_mapping import get_model_conversion_mapping

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule
    from transformers import PreTrainedModel

__all__ = [
    "DefaultAllGather",
    "DefaultReduceScatter",
    "TorchDispatchMode",
    "checkpoint_activations",
    "checkpointing_options",
    "converts_checkpoints",
    "default_store",
    "default_timeout",
    "fake_store",
    "forget_fsdp",
    "forget_values",
    "fsdp_groups",
    "functional_collectives",
    "has_unreduced_gradients",
    "is_compiled",
    "is_connection_error",
    "is_forgotten",
    "is_hook_of_fsdp",
    "is_in_ddp",
    "is_within_backward",
    "let_meshes_forget_their_groups",
    "meshes_unseen",
    "norms_mixed_meshes",
    "reduce_missing_gradients",
    "reset_after_exception",
    "reset_sharded_parameters",
    "saves_on_every_rank",
    "tree_flatten",
    "tree_leaves",
    "tree_unflatten",
    "versions",
]


def reset_after_exception(model: nn.Module) -> None:
    """Forget a forward or backward that an exception cut short (torch >= 2.13; before, FSDP2 cannot), and the gradients
    of its accumulation window that are not reduced yet, which FSDP2 would add to the next one."""
    reset = getattr(model, "reset_iter_state", None)
    if reset is not None:
        with contextlib.suppress(AttributeError):  # of a model that has never run, in which there is nothing to forget
            reset()
    for module in model.modules():
        for group in fsdp_groups(module) if hasattr(module, "_get_fsdp_state") else ():  # type: ignore[arg-type]
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                unsharded = getattr(parameter, "_unsharded_param", None)
                if unsharded is not None:
                    unsharded.grad = None


def fsdp_groups(module: "FSDPModule") -> list[Any]:
    """FSDP2's parameter groups of one module.

    What is used of a group is private to torch as well: ``is_unsharded``, ``_is_hsdp``, ``mesh_info``,
    ``_all_gather_comm``, ``_reduce_scatter_comm`` and ``_all_reduce_hook``.
    """
    return module._get_fsdp_state()._fsdp_param_groups


def has_unreduced_gradients(module: "FSDPModule") -> bool:
    """Whether FSDP2 has gradients of the module that are not reduced yet, as between the micro-batches of a window."""
    return any(
        parameter.unsharded_accumulated_grad is not None
        or getattr(getattr(parameter, "_unsharded_param", None), "grad", None) is not None
        for group in fsdp_groups(module)
        for parameter in group.fsdp_params
    )


def reset_sharded_parameters(module: "FSDPModule") -> None:
    """FSDP2 takes the parameters that the module has now, as after ``nn.Module._apply``."""
    for group in fsdp_groups(module):
        for parameter in group.fsdp_params:
            parameter.reset_sharded_param()


def forget_fsdp(model: nn.Module) -> None:
    """Modules that were sharded may be sharded again: what FSDP2 keeps of them outside, and in hooks of a state dict
    that it registers in the first forward, is removed. Everything else of it is in their classes and attributes."""
    for module in model.modules():
        _module_state_mapping.pop(module, None)
        for hooks in (module._state_dict_pre_hooks, module._load_state_dict_pre_hooks):
            for key, hook in list(hooks.items()):
                if is_hook_of_fsdp(getattr(hook, "hook", hook)):
                    del hooks[key]


def is_hook_of_fsdp(hook: Callable) -> bool:
    return getattr(hook, "__module__", "").startswith("torch.distributed.fsdp")


def forget_values(parameter: nn.Parameter) -> None:
    """A sharded parameter no longer refers to its shard, and has an empty one: :func:`is_forgotten`."""
    parameter._local_tensor = parameter._local_tensor.new_empty(0)  # type: ignore[attr-defined]
    parameter._sdp_is_forgotten = True  # type: ignore[attr-defined]


def is_forgotten(tensor: torch.Tensor) -> bool:
    return getattr(tensor, "_sdp_is_forgotten", False)


def reduce_missing_gradients(model: "FSDPModule") -> None:
    """Gradients that a parameter did not get are reduced as zeros (torch >= 2.13 has it; before, it is added here).

    What one worker leaves out of a reduction the others would wait for.
    """
    if hasattr(model, "set_reduce_scatter_unused_params"):
        model.set_reduce_scatter_unused_params(True)
        return
    for module in model.modules():  # type: ignore[attr-defined]
        for group in fsdp_groups(module) if hasattr(module, "_get_fsdp_state") else ():
            group.post_backward = functools.partial(_post_backward_with_zeros, group)


def _post_backward_with_zeros(group: Any, *unused: Any) -> None:
    for parameter in group.fsdp_params:
        unsharded = getattr(parameter, "_unsharded_param", None)
        if unsharded is not None and unsharded.requires_grad:
            if unsharded.grad is None and parameter.unsharded_accumulated_grad is None:
                unsharded.grad = torch.zeros_like(unsharded)
    type(group).post_backward(group)


def default_timeout() -> timedelta | None:
    """How long a collective of the default process group waits; None, torch's default, where its backend does not say
    (as ``"fake"``)."""
    for device in dist.group.WORLD._device_types:  # type: ignore[union-attr]
        backend = dist.group.WORLD._get_backend(device)  # type: ignore[union-attr]
        backend = getattr(backend, "wrapped_pg", backend)  # TORCH_DISTRIBUTED_DEBUG=DETAIL
        timeout = getattr(getattr(backend, "options", None), "_timeout", None)
        if timeout is not None:
            return timeout
    return None


def let_meshes_forget_their_groups() -> None:
    """No DeviceMesh, and nothing of FSDP2, refers to a process group any more, wherever in the process it is kept."""
    for thing in gc.get_objects():
        if issubclass(type(thing), DeviceMesh):
            vars(thing).get("_pg_registry", {}).clear()
        elif issubclass(type(thing), DataParallelMeshInfo):
            for name in vars(thing).keys() & _GROUPS_OF_A_MESH_INFO:
                setattr(thing, name, None)


_GROUPS_OF_A_MESH_INFO = {"shard_process_group", "replicate_process_group", "reduce_scatter_process_group"}


def fake_store() -> Any:
    """The store of a process group with the backend ``"fake"``: one worker without the others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore  # registers the backend

    return FakeStore()


def checkpoint_activations(model: "PreTrainedModel") -> None:
    """Recompute decoder layers in backward, non-reentrant (the method's name is new in transformers 5.23)."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def converts_checkpoints(model: "PreTrainedModel") -> bool:
    """Whether tensors of the model's checkpoints have other names or shapes than its parameters (transformers >= 5
    converts them while loading and back while saving)."""
    return bool(get_model_conversion_mapping(model, add_legacy=False))


def saves_on_every_rank(trainer_class: Any) -> bool:
    """Whether ``Trainer.save_model`` enters ``_save`` on every rank, as in later versions of transformers.

    In earlier ones rank 0 alone does.
    """
    return "not self.args.should_save" in inspect.getsource(trainer_class._save)


def versions() -> dict[str, str]:
    """Of what decides how a checkpoint is written."""
    return {name: importlib.metadata.version(name) for name in ("hf_sdp", "torch", "transformers", "accelerate")}


def checkpointing_options(module: nn.Module) -> dict[str, Any]:
    """With what a module of transformers recomputes its activations; empty when it does not."""
    if not vars(module).get("gradient_checkpointing"):
        return {}
    return getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})


def is_compiled(module: nn.Module) -> bool:
    """By ``torch.compile(module)``, or in place by ``module.compile()``."""
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None


def is_connection_error(error: BaseException) -> bool:
    """Whether a collective failed because another worker is gone. Gloo raises RuntimeErrors that name its files."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def is_in_ddp() -> bool:
    """Whether this is within a forward of DistributedDataParallel."""
    return nn.parallel.DistributedDataParallel._active_ddp_module is not None


def is_within_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def norms_mixed_meshes(trainer_class: Any) -> bool:
    """Whether the Trainer itself may compute the norm of gradients on several meshes (``_has_mixed_mesh_grads``)."""
    return hasattr(trainer_class, "_has_mixed_mesh_grads")


@contextlib.contextmanager
def meshes_unseen(trainer_module: Any) -> Iterator[None]:
    """Within, the Trainer makes no group of an optimizer for each mesh of its parameters (later versions do)."""
    sees = getattr(trainer_module, "has_mixed_dtensor", None)
    if sees is not None:
        trainer_module.has_mixed_dtensor = lambda tensors: False
    try:
        yield
    finally:
        if sees is not None:
            trainer_module.has_mixed_dtensor = sees
