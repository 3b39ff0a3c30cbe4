"""What a model must be to become a subnetwork. What is refused here would fail later, or train something else."""

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..compat import is_compiled
from ..errors import SDPConfigError
from ..families.adapters import is_adapted, is_peft_model, own_names
from .packed import full_shape
from .state import Held, unwrap

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def refuse_what_is_no_model(model: object) -> None:
    """Raises SDPConfigError for anything but a transformers model as it was made: not wrapped, not compiled."""
    if not isinstance(model, nn.Module):
        raise SDPConfigError(f"A transformers model is needed, got {type(model).__name__}.")
    for name, module in model.named_modules():
        if is_compiled(module):
            raise SDPConfigError(
                f"{name or type(unwrap(model)).__name__} is compiled: what was compiled would not be what is trained. "
                "Patch first, or leave compiling to the host: TrainingArguments(torch_compile=True), "
                "Accelerator(dynamo_backend='inductor')."
            )
    if not hasattr(model, "config") or not hasattr(model, "base_model_prefix"):
        name = type(model).__name__
        inner = next((type(m).__name__ for m in model.modules() if hasattr(m, "base_model_prefix")), "PreTrainedModel")
        raise SDPConfigError(
            f"A transformers model is needed, got {name}. Patch before wrapping (DDP, torch.compile). A module of your "
            f"own around a model (a value head) must be a model itself: class {name}({inner}), which makes the head "
            "after super().__init__(config)."
        )


def refuse_adapters(model: Any) -> None:
    """Raises SDPConfigError for adapters of PEFT that are not LoRA, are merged, or are not in a model of PEFT."""
    adapted: list[tuple[str, Any]] = [(name, m) for name, m in model.named_modules() if is_adapted(m)]
    if not is_peft_model(model):
        if adapted or getattr(model, "_hf_peft_config_loaded", False):
            raise SDPConfigError(
                f"{type(model).__name__} has adapters without a model of PEFT around it, which saves and loads them. "
                "Use peft.get_peft_model(model, LoraConfig(...)) instead of model.add_adapter."
            )
        return
    others = {name: c.peft_type for name, c in model.peft_config.items() if c.peft_type != "LORA"}
    if others:
        found = ", ".join(f"{name!r} is {getattr(kind, 'value', kind)}" for name, kind in others.items())
        raise SDPConfigError(f"Of PEFT's adapters SDP trains LoRA's, with DoRA and rsLoRA; {found}. Use LoraConfig.")
    tokens = [name for name, c in model.peft_config.items() if getattr(c, "trainable_token_indices", None)]
    if tokens:
        raise SDPConfigError(
            f"The adapter {tokens[0]!r} has trainable_token_indices, which SDP cannot train. Name the embeddings in "
            "LoraConfig(modules_to_save=[...])."
        )
    merged = next((name for name, module in adapted if module.merged), None)
    if merged is not None:
        raise SDPConfigError(f"The adapters of {merged} are merged into its weight. Call model.unmerge_adapter().")


def refuse_unlike_its_config(model: "PreTrainedModel") -> None:
    """Raises SDPConfigError when the config makes other parameters than the model has: the full model in evaluation,
    and whoever loads a checkpoint, makes the model of its config."""
    try:
        with torch.device("meta"):
            full = type(model)(copy.deepcopy(model.config))
    except Exception as error:  # whatever the class says to its config
        raise SDPConfigError(
            f"{type(model).__name__} cannot be made of its config alone, as evaluation and loading of checkpoints do "
            f"({type(error).__name__}: {error})."
        ) from error
    found, expected = _own_parameters(model), _own_parameters(full)
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            raise SDPConfigError(
                f"{name} {_as_text(found.get(name))}, but by the model's config it {_as_text(expected.get(name))}. "
                "Evaluation and checkpoints go by the config: change it with the model (config.tie_word_embeddings, "
                "resize_token_embeddings, ...)."
            )


def _own_parameters(model: nn.Module) -> dict[str, tuple]:
    """Name without adapters -> shape, and the first name of the same parameter (tied ones have several)."""
    first: dict[int, str] = {}
    own = own_names(model)
    return {
        own[name]: (full_shape(p), first.setdefault(id(p), own[name]))
        for name, p in model.named_parameters(remove_duplicate=False)
        if name in own
    }


def _as_text(parameter: tuple | None) -> str:
    return "is not there" if parameter is None else f"has shape {parameter[0]} and is that of {parameter[1]}"


def refuse_what_fsdp_refuses(model: nn.Module) -> None:
    """FSDP2 says it in the first forward, or not at all. Raises SDPConfigError."""
    for name, p in model.named_parameters():
        if p.dim() == 0:
            raise SDPConfigError(f"{name} has no dimension along which it could be sharded. Make its shape (1,).")
        if not p.is_floating_point():
            raise SDPConfigError(f"{name} is of {p.dtype}, which cannot be trained. Make it a buffer.")


def refuse_layers_at_random(model: nn.Module) -> None:
    """A worker that leaves out a layer would not gather it, and the others would wait. Raises SDPConfigError."""
    configs = {id(c): c for module in model.modules() if (c := getattr(module, "config", None)) is not None}
    for config in configs.values():
        for name, value in vars(config).items():
            if "layerdrop" in name and isinstance(value, float) and value > 0:
                raise SDPConfigError(
                    f"{name}={value:g} of {type(config).__name__} leaves out layers at random, other ones on each "
                    "worker: they would wait for each other. Set it to 0."
                )


def refuse_mixed_groups(model: nn.Module, held: Held) -> None:
    """FSDP2 reduces the gradients of a group as one tensor, and says only in the first forward that it cannot.

    ``model``: not cut yet. Raises SDPConfigError, the same on every worker.
    """
    parameters = dict(model.named_parameters())
    for names in _sharded_together(held):
        examples = {p.dtype: n for n in names if (p := parameters.get(n)) is not None and p.requires_grad}
        if len(examples) > 1:
            found = ", ".join(f"{name} is {str(dtype).removeprefix('torch.')}" for dtype, name in examples.items())
            raise SDPConfigError(
                f"Parameters that are sharded together need one dtype: {found}. Load the model in one dtype, or use "
                "level='neuron' for float32 norms."
            )


def _sharded_together(held: Held) -> Iterator[list[str]]:
    """Full parameter names, also of what only other workers hold."""
    for group in held.groups:
        yield [region.name for region in group.tensors.values()]
    if held.is_cut:
        by_layer: dict[tuple[int, int], list[str]] = {}
        for part in held.plan.parts:
            by_layer.setdefault((part.module.layer, part.holder_set), []).extend(part.regions)
        yield from by_layer.values()
