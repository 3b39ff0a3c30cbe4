"""One worker's subnetwork as a smaller standard model, which knows nothing of SDP."""

import copy
import os
from pathlib import Path

import torch
from torch import nn

from ..engine.exchange import consolidate
from ..errors import SDPConfigError
from ..families.meta_model import meta_model
from ..model.state import SDPState, get_state, unwrap
from ..plan.plan import Plan
from ..world.agreement import together
from .weights import WeightsWriter


@torch.no_grad()
def export_subnetwork(model: nn.Module, folder: str | os.PathLike, subnetwork: int = 0) -> None:
    """Save what ``subnetwork`` holds as a standard Hugging Face model that ``from_pretrained`` loads. Collective.

    At neuron level the model is narrower (fewer heads, a smaller intermediate size), with ``block_granularity="layer"``
    it has fewer layers. Its logits are those of the subnetwork in training, up to rounding.

    Raises: SDPConfigError on every worker, before anything is written, when the architecture's config cannot say it: single
        sub-blocks, layers of different widths; or with backward masking, where a subnetwork computes with the full model.
    """
    model = unwrap(model)
    state = get_state(model)
    writer = None
    with together(state.control_group):
        config, small, names = _small_model(state, subnetwork)
        if state.rank == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            specs = {
                names[n]: (shape, _dtype(model, state, n)) for n, shape in _held_shapes(state.plan, subnetwork).items()
            }
            writer = WeightsWriter(folder, specs)
    held = state.plan.held(subnetwork)

    def write(name: str, tensor: torch.Tensor) -> None:
        if name in held and name in names:
            pieces = [tensor.narrow(s.dim, s.start, s.stop - s.start) for s in held[name]]
            writer.write(names[name], torch.cat(pieces, held[name][0].dim) if len(pieces) > 1 else pieces[0])

    consolidate(model, write)
    with together(state.control_group):
        if writer is not None:
            writer.finish()
            config.architectures = [state.model_name]
            config.dtype = str(_dtype(model, state, next(iter(names)))).removeprefix("torch.")
            config.save_pretrained(folder)
            if small.can_generate():
                model.generation_config.save_pretrained(folder)


def _dtype(model: nn.Module, state: SDPState, name: str) -> torch.dtype:
    return state.dtypes.get(name) or next(model.parameters()).dtype


def _held_shapes(plan: Plan, subnetwork: int) -> dict[str, tuple[int, ...]]:
    """Full parameter name -> shape of what the subnetwork holds of it, its slices put together."""
    shapes = {}
    for name, slices in plan.held(subnetwork).items():
        shape = list(plan.shapes[name])
        if shape:
            shape[slices[0].dim] = sum(s.stop - s.start for s in slices)
        shapes[name] = tuple(shape)
    return shapes


def _small_model(state: SDPState, subnetwork: int):
    """Config and meta model of the subnetwork, and the names: of the full model -> of the small one."""
    plan, config = state.plan, copy.deepcopy(state.full_config)
    if plan.masking == "backward":
        raise SDPConfigError("With masking='backward' a subnetwork computes with the full model. Use save_pretrained.")
    shapes = _held_shapes(plan, subnetwork)
    if plan.level == "neuron":
        _narrow_config(config, plan, subnetwork)
        names = {name: name for name in shapes}
    elif all(module.kind == "layer" for module in plan.modules):
        kept = [module for module in plan.modules if subnetwork in plan.unit_holders[module.name][0]]
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
    small = meta_model(config)
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
        held = sum(subnetwork in holders for holders in plan.unit_holders[module.name])
        widths.setdefault(module.kind, set()).add((held, module.num_units))
    for kind, found in widths.items():
        if len(found) > 1:
            raise SDPConfigError(
                f"Subnetwork {subnetwork} holds {sorted(found)} (units, of units) in different {kind} modules; a config has one "
                "width for all layers. Use a coverage whose parts are equal."
            )
    text = config.get_text_config()
    if "attention" in widths:
        held, num_units = widths["attention"].pop()
        text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        text.num_attention_heads = text.num_attention_heads * held // num_units
        if getattr(text, "num_key_value_heads", None):
            text.num_key_value_heads = text.num_key_value_heads * held // num_units
    if "mlp" in widths:
        held, num_units = widths["mlp"].pop()
        text.intermediate_size = text.intermediate_size * held // num_units
