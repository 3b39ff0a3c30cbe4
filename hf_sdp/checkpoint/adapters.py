"""The adapters of a model of PEFT: saved and loaded as PEFT does it, and never the frozen model around them.

Which tensors of an adapter a folder has, and under which names, is what ``get_peft_model_state_dict`` says. Source:
peft/utils/save_and_load.py, peft/peft_model.py.
"""

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..engine.consolidate import full_tensors, persistent_buffers
from ..engine.sharded import control_group
from ..errors import SDPConfigError
from ..families.adapters import prefix_of, without_peft
from ..model.state import get_state
from ..world.agreement import from_rank_0, together
from .weights import RenamedWeights, Weights

FILE = "adapter_model.safetensors"
_CONFIG = "adapter_config.json"
_SCALES = ("lora_alpha", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "r")
"""Options of an adapter by which the same weights mean something else."""


def saved_names(model: Any, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """For each adapter of a model of PEFT: name of a tensor in its file -> name in the model of transformers.

    ``names``: of that model's full parameters and buffers.
    """
    from peft import get_peft_model_state_dict

    prefix = prefix_of(model)
    tensors = {prefix + name: torch.empty(0, device="meta") for name in names}
    name_of = {id(tensor): name.removeprefix(prefix) for name, tensor in tensors.items()}
    return {
        adapter: {
            key: name_of[id(tensor)]
            for key, tensor in get_peft_model_state_dict(model, dict(tensors), adapter_name=adapter).items()
        }
        for adapter in model.peft_config
    }


def refuse_what_is_not_saved(model: Any) -> None:
    """A checkpoint of PEFT has its adapters, and nothing else. Raises SDPConfigError for what would be lost."""
    parameters = dict(without_peft(model).named_parameters())
    saved = {name for of_adapter in saved_names(model, parameters).values() for name in of_adapter.values()}
    lost = sorted(name for name, p in parameters.items() if p.requires_grad and name not in saved)
    if lost:
        raise SDPConfigError(
            f"{len(lost)} parameters learn but are in no adapter, the first is {lost[0]}: PEFT saves adapters only. "
            "Name its module in LoraConfig(modules_to_save=[...]), or freeze it."
        )


def _saved_names(model: Any) -> dict[str, dict[str, str]]:
    """Of a patched model. Collective: PEFT looks into files for some of it."""
    held, base = get_state(model).held, without_peft(model)
    buffers = [name for name, _ in base.named_buffers()]
    return from_rank_0(lambda: saved_names(model, [*held.plan.shapes, *held.tied, *buffers]), control_group(model))


def adapter_tensors(model: Any) -> dict[str, str]:
    """Of a patched model: name of each parameter and buffer that PEFT saves -> the one in the plan, if it is tied.

    Collective.
    """
    tied = get_state(model).held.tied
    return {name: tied.get(name, name) for of_adapter in _saved_names(model).values() for name in of_adapter.values()}


@torch.no_grad()
def adapter_weights(model: nn.Module) -> dict[str, torch.Tensor] | None:
    """What PEFT saves of a sharded model, by the names of ``model.state_dict()``, on the CPU of rank 0; None on the
    other workers. Collective. Raises: as ``engine.consolidate.full_tensors``."""
    wanted, prefix = adapter_tensors(model), prefix_of(model)
    found = dict(full_tensors(model, set(wanted.values())))
    if get_state(model).held.rank != 0:
        return None
    found |= persistent_buffers(without_peft(model))
    return {prefix + name: value for name, own in wanted.items() if (value := found[own]) is not None}


NOT_GIVEN: Any = object()
"""Of an argument that has None as a value."""


class SavesAdapters:
    """Mixed into the class of a model of PEFT around a patched one: ``model.save_pretrained`` saves full adapters."""

    def add_adapter(self, adapter_name, *args, **kwargs):
        raise SDPConfigError(
            f"Adapter {adapter_name!r} would be added to slices, and is in no plan: add adapters before patch_model. "
            "TRL's DPOTrainer adds one (a copy, as the reference): give it the model without patch_model, with "
            "SDPCallback(SDPConfig(...)), or a ref_model."
        )

    def save_pretrained(self, save_directory, *args, state_dict=NOT_GIVEN, **kwargs):
        """Collective when ``state_dict`` is not given: call it on every worker, rank 0 writes."""
        model: Any = self
        original = functools.partial(super().save_pretrained, save_directory, *args)  # type: ignore[misc]
        if state_dict is None and get_state(model).held.rank != 0:
            return  # state_dict=accelerator.get_state_dict(model), which only rank 0 has
        if state_dict is not NOT_GIVEN:
            return original(state_dict=state_dict, **kwargs)
        if get_state(model).held.simulated:
            return original(**kwargs)
        weights = adapter_weights(model)
        with together(control_group(model)):
            if weights is not None:
                original(state_dict=weights, **kwargs)


def saved_adapters(model: Any, folder: str | os.PathLike) -> RenamedWeights:
    """The adapters of a folder, by the names that they have in a patched model. Collective.

    Raises: SDPConfigError on every worker when one is missing, is of another shape, or means something else.
    """
    places: dict[str, tuple[Weights, str]] = {}
    shapes = get_state(model).held.plan.shapes
    saved = _saved_names(model)
    with together(control_group(model)):
        for adapter, names in saved.items():
            of_adapter = Path(folder) if adapter == "default" else Path(folder) / adapter
            weights = Weights(of_adapter, dict.fromkeys(names, FILE))
            weights.check({key: shapes[name] for key, name in names.items() if name in shapes})
            _check_config(model.peft_config[adapter], of_adapter / _CONFIG)
            places |= {name: (weights, key) for key, name in names.items()}
    return RenamedWeights(places)


def _check_config(config: Any, file: Path) -> None:
    saved = json.loads(file.read_text()) if file.is_file() else {}
    for name in _SCALES:
        if name in saved and saved[name] != getattr(config, name, saved[name]):
            raise SDPConfigError(
                f"{file} is of another adapter: {name}={saved[name]!r} there, {getattr(config, name)!r} here."
            )
