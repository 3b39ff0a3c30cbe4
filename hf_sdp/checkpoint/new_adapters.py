"""New adapters around a base that no worker ever has in full: the base is read from its own folder, slice by slice."""

import hashlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..engine.sharded import control_group, stored_tensors
from ..errors import SDPConfigError
from ..families.adapters import own_names, without_peft
from ..model.state import get_state
from ..world.agreement import together
from .weights import RenamedWeights, Weights

if TYPE_CHECKING:
    from peft import PeftConfig

_COPIES = ".modules_to_save.default."


def with_new_adapters(model: Any, config: "PeftConfig") -> Any:
    """A model of PEFT around one on the meta device.

    Raises: SDPConfigError for adapters that begin with values of the base.
    """
    from peft import get_peft_model

    options = config.to_dict()
    if options.get("use_dora") or options.get("init_lora_weights", True) is not True:
        raise SDPConfigError(
            f"use_dora={options.get('use_dora')} and init_lora_weights={options.get('init_lora_weights')!r} begin with "
            "values of the base, which no worker has in full here. Load the base by transformers, then call "
            "get_peft_model and patch_model."
        )
    with torch.device("meta"):
        return get_peft_model(model, config)


def weights_of_base(model: Any, weights: Weights) -> RenamedWeights:
    """The base's weights, by the names that its parameters have in a model of PEFT that is not patched yet.

    Copies that learn (``modules_to_save``) begin with the same values.
    """
    base = without_peft(model)
    names = own_names(base)
    copies = {name: name.replace(_COPIES, ".") for name, _ in base.named_parameters() if _COPIES in name}
    return RenamedWeights({name: (weights, key) for name, key in (names | copies).items() if key in weights.files})


@torch.no_grad()
def initialize_adapters(model: Any, weights: RenamedWeights, seed: int) -> None:
    """What the base's weights do not have: as LoRA begins, A at random and B zero. Collective.

    The values depend on ``seed`` and the parameter's name: they are the same whatever the world and the plan. Source:
    peft/tuners/lora/layer.py (reset_lora_parameters).
    """
    shapes = get_state(model).held.plan.shapes
    with together(control_group(model)):
        for region, tensor in stored_tensors(model):
            if weights.shape(region.name) is None:
                tensor.copy_(region.of(_initial(region.name, shapes[region.name], tensor.dtype, seed)))


def seed_of(text: str) -> int:
    """The same on all workers and machines."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _initial(name: str, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    values = torch.zeros(shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(f"{seed}/{name}"))
        if ".lora_A." in name:
            nn.init.kaiming_uniform_(values, a=math.sqrt(5))
        elif ".lora_embedding_B." in name:
            nn.init.normal_(values)
    return values.to(dtype)
