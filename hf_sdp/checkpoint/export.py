"""One worker's subnetwork as a smaller standard model, which knows nothing of SDP."""

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..engine.consolidate import consolidate
from ..engine.presence import come_to
from ..engine.sharded import control_group, find_sharded
from ..errors import SDPConfigError
from ..families.kinds import KINDS, LAYER
from ..families.meta_model import meta_model
from ..model.state import Held, get_state, unwrap
from ..plan.plan import Plan
from ..world.agreement import together
from .weights import WeightsWriter

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def export_subnetwork(model: "PreTrainedModel", folder: str | os.PathLike, subnetwork: int = 0) -> None:
    """Save what ``subnetwork`` holds as a standard Hugging Face model that ``from_pretrained`` loads. Collective.

    At neuron level the model is narrower (fewer heads, a smaller intermediate size), with ``block_granularity="layer"``
    it has fewer layers. Its logits are those of the subnetwork in training, up to rounding.

    Args:
        subnetwork: its number, from 0 to N - 1. Worker w trains number w mod N.
    Raises: SDPConfigError on every worker, before anything is written, when the architecture's config cannot say it:
        single sub-blocks, or layers of different widths. Also for a number that is none, and with backward masking,
        where a subnetwork computes with the full model. SDPStateError before the model is prepared.
    """
    model = unwrap(model)
    held, group = get_state(model).held, control_group(model)
    writer = None
    come_to(model, "export_subnetwork")
    with together(group):
        config, small, names = _small_model(held, subnetwork)
        regions = {name: held.plan.held_region(name, subnetwork) for name in names}
        if held.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            specs = {names[name]: (region.shape, _dtype(model, name)) for name, region in regions.items()}
            writer = WeightsWriter(folder, specs)

    def write(name: str, tensor: torch.Tensor) -> None:
        assert writer is not None  # only rank 0, which has made it, writes
        if name in regions:
            writer.write(names[name], regions[name].of(tensor))

    consolidate(model, write)
    with together(group):
        if writer is not None:
            writer.finish()
            config.architectures = [held.model_name]
            config.dtype = str(_dtype(model, next(iter(names)))).removeprefix("torch.")
            config.save_pretrained(folder)
            if small.can_generate():
                model.generation_config.save_pretrained(folder)


def _dtype(model: nn.Module, name: str) -> torch.dtype:
    sharded = find_sharded(model)
    return next(model.parameters()).dtype if sharded is None else sharded.dtypes[name]


def _small_model(held: Held, subnetwork: int):
    """Config and meta model of the subnetwork, and the names: of the full model -> of the small one."""
    plan, config = held.plan, copy.deepcopy(held.full_config)
    if plan.masking == "backward":
        raise SDPConfigError("With masking='backward' a subnetwork computes with the full model. Use save_pretrained.")
    shapes = {name: plan.held_region(name, subnetwork).shape for name in plan.held(subnetwork)}
    if plan.level == "neuron":
        _narrow_config(config, plan, subnetwork)
        names = {name: name for name in shapes}
    elif all(module.of_kind is LAYER for module in plan.modules):
        kept = [module for module in plan.modules if subnetwork in plan.unit_holders[module.name][0]]
        if not isinstance(getattr(config, "num_hidden_layers", None), int):
            raise SDPConfigError(f"{type(config).__name__} has no number of layers that could be a smaller one.")
        config.num_hidden_layers = len(kept)
        if getattr(config, "layer_types", None):
            config.layer_types = [config.layer_types[module.layer] for module in kept]
        new = {m.name + ".": f"{m.name.rpartition('.')[0]}.{index}." for index, m in enumerate(kept)}
        names = {name: _renamed(name, new) for name in shapes}
    else:
        raise SDPConfigError(
            "Single sub-blocks are held (level='block'): no config says that a layer has an attention and no MLP. "
            "block_granularity='layer' and level='neuron' can be exported."
        )
    try:
        config.validate()
    except Exception as error:  # the host's validators raise what they like
        raise SDPConfigError(
            f"{type(config).__name__} refuses the sizes of subnetwork {subnetwork}: {error.__cause__ or error}"
        ) from error
    small = meta_model(config, held.model_class)
    expected = {name: tuple(p.shape) for name, p in small.named_parameters()}
    found = {names[name]: shape for name, shape in shapes.items()}
    if expected != found:
        name = next(n for n in sorted(expected.keys() | found.keys()) if expected.get(n) != found.get(n))
        raise SDPConfigError(
            f"The config of {type(config).__name__} cannot express subnetwork {subnetwork}: {name} has shape "
            f"{found.get(name)}, the model of that config {expected.get(name)}."
        )
    return config, small, names


def _renamed(name: str, new: dict[str, str]) -> str:
    for old, replacement in new.items():
        if name.startswith(old):
            return replacement + name.removeprefix(old)
    return name


def _narrow_config(config, plan: Plan, subnetwork: int) -> None:
    """Fewer key/value heads with their query heads, and fewer neurons: the same in every layer."""
    widths: dict[str, set[tuple[int, int]]] = {}
    for module in plan.modules:
        held = plan.held_units(module, subnetwork)
        widths.setdefault(module.kind, set()).add((len(held), module.num_units))
    for kind, found in widths.items():
        if len(found) > 1:
            raise SDPConfigError(
                f"Subnetwork {subnetwork} holds {sorted(found)} (units, of units) in different {kind} modules; a "
                "config has one width for all layers. Use a coverage whose parts are equal."
            )
        try:
            KINDS[kind].narrow(config.get_text_config(), *found.pop())
        except AttributeError as error:  # channels, or a width that is a ratio
            raise SDPConfigError(
                f"The config of {type(config).__name__} cannot express subnetwork {subnetwork}: {error}."
            ) from error
