"""The full model becomes what one worker holds of it, in place.

Every module of the full model stays the object that it is. A module that is cut has two forms, which differ in its
tensors: in training what is held, in evaluation the full one, for the time of a call (``engine/evaluation.py``).
"""

import functools
from collections.abc import Iterable
from types import MethodType
from typing import Any

import torch
from torch import nn

from ..errors import SDPConfigError, SDPStateError
from ..families import Structure
from ..families.absent import Absent
from ..plan.subnetwork import LocalModule, Subnetwork
from .layers import SharedBias, copy_for_part, narrow
from .mixin import mix_in
from .state import Run


class CutModule(nn.Module):
    """Mixed into the class of a module that this worker holds in part or not at all.

    The switch is in ``__call__``: other libraries replace ``forward`` on the instance. What they put there computes the
    full module in evaluation, and each part that is held in training.

    Attributes:
        sdp_full: its full parameters (``_tensors_on_meta``); the engine gives them values.
        sdp_sum, sdp_absent: what computes what is held; neither where the module itself does.
        sdp_replaced: what was set as its forward on the instance.
    """

    sdp_run: Run
    sdp_full: nn.Module
    sdp_sum: "PartSum | None"
    sdp_absent: nn.Module | None
    sdp_replaced: Any

    def __call__(self, *args, **kwargs):
        if "forward" in vars(self):
            vars(self)["sdp_replaced"] = vars(self).pop("forward")
        if self.sdp_run.computes == "full":
            return self._call_full(*args, **kwargs)
        if self.sdp_run.computes is None and not self.training and self.sdp_run.evaluates_full:
            raise SDPStateError(
                f"A {type(self).__name__} of a patched model was called in eval mode on its own. No worker has all of "
                "it: call the model itself, prepared (Trainer.train, Trainer.evaluate or SDPAccelerator.prepare)."
            )
        return super().__call__(*args, **kwargs)

    @torch.compiler.disable
    def _call_full(self, *args, **kwargs):
        full_model = self.sdp_run.full_model
        assert full_model is not None  # else the model's forward would not be the full one's
        args, kwargs = full_model.cast((args, kwargs))
        with full_model.form_of(self):
            return super().__call__(*args, **kwargs)

    def forward(self, *args, **kwargs):
        if self.sdp_run.computes != "full":
            if self.sdp_absent is not None:
                return self.sdp_absent(*args, **kwargs)
            if self.sdp_sum is not None:
                return self.sdp_sum(self.sdp_replaced, *args, **kwargs)
        if self.sdp_replaced is not None:
            return self.sdp_replaced(*args, **kwargs)
        return super().forward(*args, **kwargs)


class PartSum(nn.Module):
    """A module held in several parts: the sum over narrow copies of it, in sorted order of their holder sets.

    Biases of row-wise layers come after all parts. In one of the parts they would break the global order of
    communication: they are gathered by all workers, and the first part of one worker is the second of another.
    Attention returns ``(output, weights)``; the weights of a subnetwork's heads are not put together.
    """

    def __init__(self, parts: nn.ModuleList, shared_biases: nn.ModuleDict):
        super().__init__()
        self.parts, self.shared_biases = parts, shared_biases

    def forward(self, replaced, *args, **kwargs):
        """``replaced``: what was set as the forward of the module after patching, or None."""
        if replaced is not None:
            for part in self.parts:
                part.forward = _bound_to(part, replaced)
        outputs = [part(*args, **kwargs) for part in self.parts]
        returns_tuple = isinstance(outputs[0], tuple)
        total = functools.reduce(torch.add, (output[0] for output in outputs) if returns_tuple else outputs)
        for bias in self.shared_biases.values():
            total = bias(total)
        return (total, None) if returns_tuple else total


def _bound_to(part: nn.Module, replaced) -> MethodType:
    if not isinstance(replaced, MethodType):
        raise SDPConfigError(
            f"The forward of a {type(part).__name__} was replaced by {replaced!r}, which is not a method: it cannot be "
            "called for each part that this worker holds. Use level='block', or a coverage of 1/k for all."
        )
    return MethodType(replaced.__func__, part)


def cut(model: nn.Module, subnetwork: Subnetwork, structure: Structure, run: Run) -> None:
    """Cut every maskable module to what the worker holds. Parameters get the names of ``subnetwork.tensors``.

    ``model``: the full model, on any device; ``structure``: its structure.
    """
    for local in subnetwork.modules:
        for name in local.module.members:
            module = model.get_submodule(name)
            full = None if subnetwork.plan.is_shared(local.module) else _tensors_on_meta(module)
            held_sum, absent = None, None
            if not local.parts:
                absent = Absent(type(module), structure.absent[name])
                _let_go(module, name, local.module.dims)
            elif subnetwork.plan.level == "neuron":
                held_sum = _narrow(module, local)
            if full is None:
                continue
            mix_in(module, CutModule)
            # Not through nn.Module.__setattr__: none of them is a child.
            vars(module).update(sdp_run=run, sdp_full=full, sdp_sum=held_sum, sdp_absent=absent, sdp_replaced=None)


def _narrow(module: nn.Module, local: LocalModule) -> PartSum | None:
    if not local.is_sum:
        narrow(module, local.parts[0].part, adds_bias=True)
        return None
    biases = {bias.child: SharedBias(module.get_submodule(bias.child).get_parameter("bias")) for bias in local.biases}
    parts = nn.ModuleList(copy_for_part(module, held.part) for held in local.parts)
    for part, held in zip(parts, local.parts, strict=True):
        narrow(part, held.part, adds_bias=False)
    _let_go(module, local.module.name, [*local.module.dims, *(bias.name for bias in local.biases)])
    module.parts, module.shared_biases = parts, nn.ModuleDict(biases)
    return PartSum(parts, module.shared_biases)


def _let_go(module: nn.Module, name: str, tensors: Iterable[str]) -> None:
    """Of those of ``tensors``, by their full names, that ``module``, whose full name is ``name``, has."""
    for tensor in tensors:
        if tensor.startswith(name + "."):
            owner, _, last = tensor.removeprefix(name + ".").rpartition(".")
            tensors_of_owner = vars(module.get_submodule(owner))
            for kind in ("_parameters", "_buffers"):
                if last in tensors_of_owner[kind]:
                    tensors_of_owner[kind][last] = None


def _tensors_on_meta(module: nn.Module) -> nn.Module:
    """The parameters of ``module`` by their names, without gradients, on the meta device, in modules that do nothing.

    ``sdp_sizes`` of each: attributes of a full linear layer that a narrow one has otherwise.
    """
    made = nn.Module()
    sizes = {name: size for name in ("in_features", "out_features") if (size := vars(module).get(name)) is not None}
    object.__setattr__(made, "sdp_sizes", sizes)
    for name, parameter in module._parameters.items():
        meta = None if parameter is None else nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        made.register_parameter(name, meta)
    for name, child in module.named_children():
        if any(True for _ in child.parameters()):
            made.add_module(name, _tensors_on_meta(child))
    return made
