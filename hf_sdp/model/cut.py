"""The full model becomes what one worker holds of it, in place."""

from torch import nn

from ..plan.subnetwork import LocalModule, Subnetwork
from .layers import PartSum, absent, narrow_module


def cut(model: nn.Module, subnetwork: Subnetwork) -> None:
    """Replace every maskable module by what the worker holds of it. Parameters get the names of ``subnetwork.tensors``.

    ``model``: the full model, on any device.
    """
    for local in subnetwork.modules:
        if not local.parts:
            _skip(model, local)
        elif subnetwork.plan.level == "neuron":
            _narrow(model, local)


def _skip(model: nn.Module, local: LocalModule) -> None:
    for name, replacement in absent(local.module).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, replacement)


def _narrow(model: nn.Module, local: LocalModule) -> None:
    name = local.module.name
    module = model.get_submodule(name)
    biases = {bias.child: model.get_parameter(bias.name) for bias in local.biases}
    narrowed = [narrow_module(module, part.part, adds_bias=not local.is_sum) for part in local.parts]
    if len(narrowed) == 1:  # keep the module object itself: hooks and references of the host stay valid
        for tensors in ("_modules", "_parameters", "_buffers"):
            object.__setattr__(module, tensors, vars(narrowed[0])[tensors])
        narrowed = [module]
    if local.is_sum:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, PartSum(narrowed, biases))
