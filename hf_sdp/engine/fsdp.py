"""FSDP2 on groups of modules: what is said of all models that are sharded, by a plan or plainly."""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from ..compat import fsdp_groups
from ..families import structure_of
from ..model.state import unwrap
from ..plan.groups import Group, data_parallel_groups
from ..plan.holders import Holders


def fully_shard_groups(
    model: nn.Module,
    groups: Iterable[Group],
    meshes: Mapping[Holders, DeviceMesh],
    *,
    reshard_after_forward: bool,
    mp_policy: MixedPrecisionPolicy,
) -> None:
    """``fully_shard`` the modules of each group over the mesh of its holders, in place. Parameters in them that are
    another group's are left to it."""
    for group in groups:
        modules = [model.get_submodule(name) for name in group.modules]
        own = {model.get_parameter(name) for name in group.tensors}
        with _within_reach(modules[0], _out_of_reach(model, group)):
            fully_shard(
                modules if len(modules) > 1 else modules[0],
                mesh=meshes[group.holders],
                reshard_after_forward=reshard_after_forward,
                mp_policy=mp_policy,
                ignored_params={p for module in modules for p in module.parameters()} - own,
            )


def _out_of_reach(model: nn.Module, group: Group) -> list[nn.Module]:
    """Modules with parameters of the group that are in modules of groups before it (norms of a head, in a part), or in
    none of the group's (adapters, which may be switched off)."""
    owners = dict.fromkeys(name.rpartition(".")[0] for name in group.tensors)
    within = {module for name in group.modules for module in model.get_submodule(name).modules()}
    found = [(model.get_submodule(owner), owner) for owner in owners]
    return [module for module, owner in found if module not in within or any(map(_is_sharded, _path(model, owner)))]


def _path(model: nn.Module, name: str) -> Iterator[nn.Module]:
    for child in filter(None, name.split(".")):
        model = model.get_submodule(child)
        yield model


def _is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


@contextlib.contextmanager
def _within_reach(module: nn.Module, others: list[nn.Module]) -> Iterator[None]:
    """FSDP2 does not look for parameters in modules that it has sharded before: ``others`` are children meanwhile."""
    if others:
        module.add_module(_MEANWHILE, nn.ModuleList(others))
    try:
        yield
    finally:
        module._modules.pop(_MEANWHILE, None)


_MEANWHILE = "hf_sdp_meanwhile"


def fully_shard_plainly(
    model: nn.Module, device_type: str, *, reshard_after_forward: bool, mp_policy: MixedPrecisionPolicy | None = None
) -> None:
    """Plain FSDP2 of a full model (or that in one of PEFT) over the world, in place. Collective (it makes a mesh)."""
    model = unwrap(model)
    num_workers = dist.get_world_size()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    groups = data_parallel_groups(structure_of(model), shapes, num_workers)
    fully_shard_groups(
        model,
        groups,
        {groups[-1].holders: DeviceMesh(device_type, torch.arange(num_workers))},
        reshard_after_forward=reshard_after_forward,
        mp_policy=mp_policy or MixedPrecisionPolicy(),
    )


def mixed_precision_policy(param_dtype: str | None, reduce_dtype: str | None = None) -> MixedPrecisionPolicy:
    """Names of dtypes as in ``SDPConfig``; None: as stored, and that of the gradients."""

    def dtype(name: str | None) -> torch.dtype | None:
        return None if name is None else getattr(torch, name)

    return MixedPrecisionPolicy(param_dtype=dtype(param_dtype), reduce_dtype=dtype(reduce_dtype))


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in unwrap(model).modules() if isinstance(module, FSDPModule)]


def gather_with_root(model: nn.Module, modules: Iterable[str]) -> None:
    """Gather these modules when a forward of the model begins.

    A weight that is read by others, while its module is never called (a loss that is fused with the head), then is the
    gathered one, and FSDP2 reduces its gradient.
    """
    gathered: list[Any] = [model.get_submodule(name) for name in modules]

    @torch.compiler.disable
    def gather(module: nn.Module, args: tuple) -> None:
        for each in gathered:
            each.unshard()

    model.register_forward_pre_hook(gather)


def gathered_modules(model: nn.Module) -> set[FSDPModule]:
    return {m for m in fsdp_modules(model) if any(group.is_unsharded for group in fsdp_groups(m))}


def reshard(model: nn.Module, but: Collection[FSDPModule] = ()) -> None:
    """Free gathered parameters, so that the next forward gathers new values. Not from within a forward."""
    for module in fsdp_modules(model):
        if module not in but:
            module.reshard()
