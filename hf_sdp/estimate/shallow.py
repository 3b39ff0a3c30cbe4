"""A full model with few of its layers: what is traced instead of all of them."""

import copy

from torch import nn
from transformers import PreTrainedConfig

from ..errors import SDPConfigError
from ..families import Structure, structure_of
from ..families.meta_model import meta_model


def shallow_model(model_config: PreTrainedConfig, chosen: tuple[int, ...]) -> tuple[nn.Module, Structure]:
    """On the meta device, with the layers of these numbers (one may come several times) in the place of all, and its
    structure.

    Raises: SDPConfigError for a model with several stacks of layers.
    """
    model = meta_model(model_config)
    full = structure_of(model)
    stacks = list(dict.fromkeys(layer.rpartition(".")[0] for layer in full.layers))
    if len(stacks) > 1:
        raise SDPConfigError(
            f"A step of {type(model).__name__} cannot be estimated: it has {len(stacks)} stacks of layers "
            f"({', '.join(stacks)}), and one is traced. What workers hold, compute and send is known all the same: "
            "hf-sdp plan."
        )
    owner, _, name = stacks[0].rpartition(".")
    # Not of the configs: what is changed in one is changed for all.
    configs = {id(config): config for m in model.modules() if (config := getattr(m, "config", None)) is not None}
    layers = [copy.deepcopy(model.get_submodule(full.layers[index]), dict(configs)) for index in chosen]
    setattr(model.get_submodule(owner), name, nn.ModuleList(layers))
    config = model.config.get_text_config()
    config.num_hidden_layers = len(chosen)  # some take as many from their list, and the kind of each from another one
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[index] for index in chosen]
    new = tuple(f"{stacks[0]}.{index}" for index in range(len(chosen)))
    absent = {
        place + module.removeprefix(full.layers[index]): outputs
        for place, index in zip(new, chosen, strict=True)
        for module, outputs in full.absent.items()
        if module == full.layers[index] or module.startswith(full.layers[index] + ".")
    }
    return model, Structure(new, full.outer, absent=absent)
