"""The full model becomes what one worker holds of it, in place.

Every module of the full model stays the object that it is. A module that is cut has two forms, which differ in its
tensors: in training what is held, in evaluation the full one, for the time of a call (``engine/evaluation.py``).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..errors import SDPStateError
from ..families import Structure
from ..families.absent import Absent
from ..families.kinds import EXPERTS
from ..families.layers import narrowed
from ..plan.subnetwork import LocalModule, Subnetwork
from ..plan.units import MaskableModule
from .arguments import cut_arguments
from .experts import HeldExperts
from .layers import WIDTHS, narrow
from .mixin import mix_in
from .state import Run


class CutModule(nn.Module):
    """Mixed into the class of a module that this worker holds in part or not at all.

    The switch is in ``__call__``: other libraries replace ``forward`` on the instance. What they put there computes the
    full module in evaluation, and with what is held in training.

    Attributes:
        sdp_full: its full parameters (``_tensors_on_meta``); the engine gives them values.
        sdp_absent: what is computed in its place, where nothing of it is held.
        sdp_replaced: what was set as its forward on the instance.
    """

    sdp_run: Run
    sdp_full: nn.Module
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

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and name in self._modules:
            raise SDPStateError(
                f"{name} of a {type(self).__name__} was replaced by a {type(value).__name__} after the model was "
                "patched. Change it before patching (get_peft_model too)."
            )
        super().__setattr__(name, value)

    def forward(self, *args, **kwargs):
        if not isinstance(self, CutModule):  # called by who bound it before a phase of coverage 1 took the cut back
            return type(self).forward(self, *args, **kwargs)
        if self.sdp_run.computes != "full" and self.sdp_absent is not None:
            return self.sdp_absent(*args, **kwargs)
        replaced = self.sdp_replaced
        if replaced is None:
            return super().forward(*args, **kwargs)
        vars(self)["sdp_replaced"] = None  # it may call the forward that it found: this one
        try:
            return replaced(*args, **kwargs)
        finally:
            vars(self)["sdp_replaced"] = replaced


def cut(model: nn.Module, subnetwork: Subnetwork, structure: Structure, run: Run) -> None:
    """Cut every maskable module to what the worker holds. Parameters get the names of ``subnetwork.tensors``.

    ``model``: the full model, on any device; ``structure``: its structure.
    """
    for local in subnetwork.modules:
        is_cut = not subnetwork.plan.is_shared(local.module)
        members = {name: model.get_submodule(name) for name in local.module.members}
        full = {name: _tensors_on_meta(module, name, local.module) for name, module in members.items() if is_cut}
        if subnetwork.plan.level == "neuron":
            _narrow(model, local)
            if is_cut and local.parts:
                cut_arguments(model, local, run)
        for name, module in members.items():
            absent = None
            if not local.parts:
                absent = Absent(type(module), structure.absent[name])
                _let_go(module, name, local.module.dims)
            if is_cut:
                mix_in(module, CutModule)
                # Not through nn.Module.__setattr__: none of them is a child.
                vars(module).update(sdp_run=run, sdp_full=full[name], sdp_absent=absent, sdp_replaced=None)


def _narrow(model: nn.Module, local: LocalModule) -> None:
    for owner, of_owner in local.module.by_owner.items():
        regions = [{name: held.part.regions[f"{owner}.{name}"] for name in of_owner} for held in local.parts]
        narrow(model.get_submodule(owner), regions, of_owner, has_parts=local.has_parts)
    if len(local.units) == local.module.num_units:
        return
    if local.module.of_kind is EXPERTS:
        _route_to_held(model.get_submodule(local.module.name), local)
    for name, attributes in local.module.sizes.items():
        module = model.get_submodule(name)
        vars(module).update(narrowed(module, attributes, len(local.units) / local.module.num_units))


def _route_to_held(experts: nn.Module, local: LocalModule) -> None:
    mix_in(experts, HeldExperts)
    held = [part.part.units for part in local.parts]
    vars(experts).update(sdp_held=held, sdp_num_experts=local.module.num_units)


def _let_go(module: nn.Module, name: str, tensors: Iterable[str]) -> None:
    """Of those of ``tensors``, by their full names, that ``module``, whose full name is ``name``, has."""
    for tensor in tensors:
        if tensor.startswith(name + "."):
            owner, _, last = tensor.removeprefix(name + ".").rpartition(".")
            tensors_of_owner = vars(module.get_submodule(owner))
            for kind in ("_parameters", "_buffers"):
                if last in tensors_of_owner[kind]:
                    tensors_of_owner[kind][last] = None


def _tensors_on_meta(module: nn.Module, name: str, of: MaskableModule) -> nn.Module:
    """The parameters of ``module`` by their names, without gradients, on the meta device, in modules that do nothing.

    ``name``: its full name. ``sdp_sizes`` of each: attributes of a full module that a narrow one has otherwise.
    """
    made = nn.Module()
    narrow_ones = {attribute.partition(".")[0] for attribute in of.sizes.get(name, ())}
    own = vars(module)
    sizes = {attribute: own[attribute] for attribute in (*WIDTHS, *sorted(narrow_ones)) if attribute in own}
    object.__setattr__(made, "sdp_sizes", sizes)
    for last, parameter in module._parameters.items():
        meta = None if parameter is None else nn.Parameter(torch.empty_like(parameter, device="meta"), False)
        made.register_parameter(last, meta)
    for child_name, child in module.named_children():
        full_name = f"{name}.{child_name}"
        if any(True for _ in child.parameters()) or any(n.startswith(full_name) for n in of.sizes):
            made.add_module(child_name, _tensors_on_meta(child, full_name, of))
    return made
