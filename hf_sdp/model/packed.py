"""Frozen weights in four bits under adapters (QLoRA with bitsandbytes): a block of them is held whole, or not at all.

The bits of a weight are in a tensor of a floating dtype, ``bnb_4bit_quant_storage``. FSDP2 shards and gathers it, and
evaluation moves it, as any other, as long as nothing casts it. What the bits mean stays with the layer, as its
``quant_state``; every worker keeps that of all layers, as it keeps buffers. Source: bitsandbytes/nn/modules.py
(``fix_4bit_weight_quant_state_from_module`` puts the two together in each forward).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..config import SDPConfig
from ..errors import SDPConfigError

_QUANTIZED = ("hf_quantizer", "is_quantized", "is_loaded_in_8bit", "is_loaded_in_4bit")
_STORAGE = "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16)"
_REASONS = {
    "bitsandbytes": "a layer of eight bits keeps its weight where sharding does not reach",
    "torchao": "its tensors have parts that would not be sharded and moved with them",
}


def is_packed(parameter: nn.Parameter) -> bool:
    return type(parameter).__name__ == "Params4bit"


def full_shape(parameter: Any) -> tuple[int, ...]:
    """That of the weight which is packed in a parameter; of any other one its own."""
    return tuple(parameter.quant_state.shape if is_packed(parameter) else parameter.shape)


def refuse_quantized(model: nn.Module, config: SDPConfig, *, is_adapted: bool) -> None:
    """Raises SDPConfigError for what is quantized otherwise than said above, and for a ``device_map``."""
    if getattr(model, "hf_device_map", None):
        raise SDPConfigError("A model with a device_map is not supported. Load it on one device, without device_map.")
    packed = {name: p for name, p in model.named_parameters() if is_packed(p)}
    if not packed:
        _refuse_other_methods(model)
        return
    if not is_adapted:
        raise SDPConfigError(
            "Quantized weights do not learn. Put adapters around them: peft.get_peft_model(model, LoraConfig(...))."
        )
    if config.level != "block":
        raise SDPConfigError(
            f"level={config.level!r} cuts weights, and four bits of a weight lie packed with others. Use level='block'."
        )
    for name, p in packed.items():
        if not p.is_floating_point():
            raise SDPConfigError(f"{name} is packed in {p.dtype}, which is not sharded. Load it with {_STORAGE}.")
        if config.param_dtype is not None and getattr(torch, config.param_dtype) is not p.dtype:
            raise SDPConfigError(
                f"param_dtype={config.param_dtype!r} would cast {name}, whose bits are packed in {p.dtype}. Use that "
                "one for both (bnb_4bit_quant_storage), or leave param_dtype out."
            )


def _refuse_other_methods(model: Any) -> None:
    quantization = getattr(model.config, "quantization_config", None)
    method = getattr(quantization, "quant_method", None)
    classes = {type(p).__module__.partition(".")[0] for p in model.parameters()}
    found = _REASONS.keys() & {getattr(method, "value", method), *classes}
    if found or quantization or any(getattr(model, name, None) for name in _QUANTIZED):
        reason = "".join(f" ({name}: {_REASONS[name]})" for name in found)
        raise SDPConfigError(
            f"Quantized models are not supported{reason}, but for bitsandbytes' four bits under adapters of PEFT. Load "
            f"the model in full (in bfloat16) and choose a coverage for its memory, or use {_STORAGE}."
        )


def let_storage_be_sharded(model: nn.Module) -> None:
    """Packed weights become plain parameters of their storage's dtype, in place; their meaning becomes buffers."""
    layer: Any
    for layer in model.modules():
        weight = layer._parameters.get("weight")
        if weight is not None and is_packed(weight):
            vars(weight).clear()
            weight.__class__ = nn.Parameter  # the same object: an optimizer may have it
            layer.support_avx512bf16_for_cpu = False  # in eval mode it would pack the weight anew, for this processor
            for name, tensor in _tensors(layer.quant_state):
                layer.register_buffer(name, tensor, persistent=False)


def _tensors(state: Any, prefix: str = "quant_state") -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("absmax", "code", "offset"):
        if getattr(state, name) is not None:
            yield f"{prefix}_{name}", getattr(state, name)
    if state.state2 is not None:
        yield from _tensors(state.state2, f"{prefix}_2")


def quant_states(model: nn.Module) -> dict[str, torch.Tensor]:
    """What packed weights mean, by the names that it has in a state dict of bitsandbytes."""
    return {
        f"{prefix}.weight.{name}": tensor
        for prefix, layer in model.named_modules()
        if (state := vars(layer).get("quant_state")) is not None
        for name, tensor in state.as_dict(packed=True).items()
    }
