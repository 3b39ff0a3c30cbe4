"""A full model with few of its layers: what is traced instead of all of them."""

import copy

from torch import nn
from transformers import PreTrainedModel

from ..families import Structure
from .shapes import ModelShapes


def shallow_model(shapes: ModelShapes, chosen: tuple[int, ...]) -> tuple[PreTrainedModel, Structure]:
    """On the meta device, with the layers of these numbers (one may come several times) in the place of all, and its
    structure. Of a model with several stacks of layers: all of it."""
    model, full = copy.deepcopy(shapes.model), shapes.structure
    if shapes.is_traced_whole:
        return model, full
    (stack,) = shapes.stacks
    owner, _, name = stack.rpartition(".")
    # Not of the configs: what is changed in one is changed for all.
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    layers = [copy.deepcopy(model.get_submodule(full.layers[index]), dict(configs)) for index in chosen]
    setattr(model.get_submodule(owner), name, nn.ModuleList(layers))
    config = model.config.get_text_config()
    config.num_hidden_layers = len(chosen)  # some take as many from their list, and the kind of each from another one
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in chosen]
    new = tuple(f"{stack}.{index}" for index in range(len(chosen)))
    absent = {
        place + module.removeprefix(full.layers[index]): outputs
        for place, index in zip(new, chosen, strict=True)
        for module, outputs in full.absent.items()
        if module == full.layers[index] or module.startswith(full.layers[index] + ".")
    }
    return model, Structure(new, full.outer, absent=absent)
