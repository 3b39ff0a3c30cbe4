"""What a step of one worker computes, traced on the meta device: bytes that live between two points, and FLOPs.

Forward and backward of the real (sub)network run without memory, on three decoder layers (``recorder.py``). Layers of one
structure are alike, so a model of any depth is put together from pieces (:class:`Trace`) in ``memory.py``.
"""

import copy
import dataclasses
import functools
import json
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..config import SDPConfig
from ..families import family_of
from ..families.meta_model import meta_model
from ..plan.plan import Holders, Plan
from ..plan.units import MaskableModule, decoder_layers
from ..workload import Workload
from .recorder import Mark, Recorder, Segment, watch

TRACED_LAYERS = 3  # one in the middle, with a layer on both sides
_ATTENTION = "hf_sdp_flash_on_meta"
_AUTOCAST = "_hf_sdp_autocast"
_aten = torch.ops.aten


Stream = tuple[Segment | Mark, ...]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Trace:
    """One step in pieces, in the order of the fields; names in the pieces of a layer are relative to it.

    Attributes:
        before: up to the first decoder layer.
        layer_forward: forward of a layer.
        to_second_layer, to_next_layer: between the first layer and the second, and other neighbours: inputs are freed,
            except for the first layer's, which transformers keeps.
        head: from the last layer to its backward.
        layer_backward: backward of a layer.
        after: after the first layer's backward.
    """

    before: Stream
    layer_forward: Stream
    to_second_layer: Stream
    to_next_layer: Stream
    head: Stream
    layer_backward: Stream
    after: Stream


_cache: dict[tuple, Trace] = {}


def trace(model_config: PretrainedConfig, workload: Workload, *, autocast: bool = False) -> list[Trace]:
    """For each decoder layer the trace of the full model. Kept: asking again costs nothing.

    Args:
        autocast: parameters and the residual stream stay float32, linear layers and attention compute in
            ``workload.dtype``, as under ``torch.autocast``; else everything is in that dtype.
    """

    def prepare(model: nn.Module) -> None:
        if autocast:
            _autocast_linear_layers(model, getattr(torch, workload.dtype))

    one = _cached(model_config, workload, ("autocast",) if autocast else (), prepare)
    return [one] * model_config.num_hidden_layers


def trace_subnetwork(
    model_config: PretrainedConfig, workload: Workload, plan: Plan, subnetwork: int
) -> tuple[list[Trace], Trace]:
    """For each decoder layer the trace of ``subnetwork`` in a model whose layers are all like it, and one for what is
    outside of the layers. Layers of the same structure, of whatever plan, are traced once."""
    of_layer: list[tuple] = [()] * model_config.num_hidden_layers
    for module in plan.modules:
        runs = _runs(plan, subnetwork, module.name)
        of_layer[module.layer] += (module.kind, module.num_units, runs, is_sum(plan, module, len(runs)))

    def traced(*layers: int) -> Trace:
        structure = (plan.level, plan.masking, *(of_layer[layer] for layer in layers))

        def patch(model: nn.Module) -> None:
            from ..patch import _patch  # not above: the planner asks for memory, and patching needs the planner

            few = _plan_of_layers(plan, layers, model)
            _patch(model, SDPConfig(level=plan.level, masking=plan.masking), subnetwork, plan.num_subnetworks, few)

        return _cached(model_config, workload, structure, patch)

    some = {structure: layer for layer, structure in enumerate(of_layer)}
    alike = {structure: traced(layer, layer, layer) for structure, layer in some.items()}
    if plan.level == "neuron":  # every layer has something of everything
        return [alike[structure] for structure in of_layer], alike[of_layer[-1]]
    # What is freed after the last layer depends on what the first one saves (the embedded tokens), and on whether any has
    # attention (and saves the rotary embeddings).
    attends = [m.layer for m in plan.modules if m.kind != "mlp" and _runs(plan, subnetwork, m.name)]
    return [alike[structure] for structure in of_layer], traced(0, attends[0] if attends else 0, len(of_layer) - 1)


def _cached(model_config: PretrainedConfig, workload: Workload, structure: tuple, patch) -> Trace:
    key = (
        json.dumps(model_config.to_dict(), sort_keys=True, default=str),
        *(workload.batch, workload.sequence, workload.dtype, workload.gradient_checkpointing),
        structure,
    )
    if key not in _cache:
        model = meta_model(shallow_config(model_config))
        patch(model)
        prefix, _ = decoder_layers(model, family_of(model.config))
        _cache[key] = _cut(_trace_stream(model, workload), prefix)
    return _cache[key]


def _runs(plan: Plan, subnetwork: int, module: str) -> tuple[int, ...]:
    """Units in each range of a module that a subnetwork computes at once: all that the memory of a layer depends on."""
    runs: list[int] = []
    previous: Holders | None = None
    for holders in plan.unit_holders[module]:
        if subnetwork not in holders:
            previous = None
            continue
        joined = previous == holders or plan.masking == "backward" and len(previous or ()) == len(holders)
        if joined:
            runs[-1] += 1
        else:
            runs.append(1)
        previous = holders
    return tuple(runs)


def is_sum(plan: Plan, module: MaskableModule, num_parts: int) -> bool:
    """Whether ``patch_model`` makes a PartSum of a module held in ``num_parts``: of several parts, and where others sum
    several parts and then add shared biases (the order is global)."""
    return num_parts > 1 or num_parts == 1 and bool(shared_biases(plan, module)) and is_split(plan, module)


def shared_biases(plan: Plan, module: MaskableModule) -> dict[str, Shape]:
    """Child name -> shape of its bias, of children whose weight is cut and whose bias is not (row-wise layers)."""
    if plan.level != "neuron" or plan.masking != "forward":
        return {}
    children = {name.removeprefix(module.name + ".").rpartition(".")[0] for name in module.dims}
    biases = {child: f"{module.name}.{child}.bias" for child in sorted(children)}
    return {child: plan.shapes[b] for child, b in biases.items() if b in plan.shapes and b not in module.dims}


def is_split(plan: Plan, module: MaskableModule) -> bool:
    """Whether some subnetwork holds several parts of a module."""
    units = plan.unit_holders[module.name]
    runs = [holders for i, holders in enumerate(units) if i == 0 or holders != units[i - 1]]
    return sum(map(len, runs)) > len(set().union(*runs))


def shallow_config(model_config: PretrainedConfig) -> PretrainedConfig:
    """The same model with few decoder layers."""
    config = copy.deepcopy(model_config)
    config.num_hidden_layers = TRACED_LAYERS
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1] * TRACED_LAYERS
    return config


def _plan_of_layers(plan: Plan, layers: tuple[int, ...], model: nn.Module) -> Plan:
    """A plan for ``model``, whose decoder layers are held as those ``layers`` are."""
    prefix, _ = decoder_layers(model, family_of(model.config))
    modules, unit_holders = [], {}
    for index, layer in enumerate(layers):
        old = f"{prefix}.{layer}"
        for module in (m for m in plan.modules if m.layer == layer):
            name = f"{prefix}.{index}" + module.name.removeprefix(old)
            dims = {f"{prefix}.{index}" + n.removeprefix(old): dim for n, dim in module.dims.items()}
            modules.append(dataclasses.replace(module, name=name, layer=index, dims=dims))
            unit_holders[name] = plan.unit_holders[module.name]
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    return dataclasses.replace(plan, shapes=shapes, modules=tuple(modules), unit_holders=unit_holders)


def _trace_stream(model: nn.Module, workload: Workload) -> list[Segment | Mark]:
    """One step of a model on the meta device. It is not to be used any more."""
    if _AUTOCAST not in vars(model):
        for p in model.parameters():
            p.data = p.data.to(getattr(torch, workload.dtype))  # not the buffers: rotary frequencies stay float32
    model.config.use_cache = False
    model.config._attn_implementation = _ATTENTION
    if workload.gradient_checkpointing:
        # The newest transformers has another name for it, and warns.
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": False})
    model.train()
    ids = torch.zeros(workload.batch, workload.sequence, dtype=torch.long, device="meta")
    recorder = Recorder([*model.parameters(), *model.buffers(), ids])
    watch(model, recorder)
    with recorder:
        loss = model(input_ids=ids, labels=ids).loss
        vars(model).get(_AUTOCAST, {}).clear()  # as autocast does when it is left
        recorder.mark("end_of_forward", "")
        loss.backward()
        del loss
        recorder.mark("end", "")
    return recorder.stream


def _cut(stream: list[Segment | Mark], prefix: str) -> Trace:
    def at(kind: str, layer: int) -> int:
        return stream.index(Mark(kind, f"{prefix}.{layer}"))

    def relative(piece: list[Segment | Mark]) -> Stream:
        own = f"{prefix}.1"
        result = []
        for item in piece:
            if isinstance(item, Mark):
                result.append(Mark(item.kind, _without(own, item.module)))
            else:
                result.append(
                    dataclasses.replace(item, gradients={_without(own, n): b for n, b in item.gradients.items()})
                )
        return tuple(result)

    last = TRACED_LAYERS - 1
    return Trace(
        before=tuple(stream[: at("pre_forward", 0)]),
        layer_forward=relative(stream[at("pre_forward", 1) : at("post_forward", 1) + 1]),
        to_second_layer=tuple(stream[at("post_forward", 0) + 1 : at("pre_forward", 1)]),
        to_next_layer=relative(stream[at("post_forward", 1) + 1 : at("pre_forward", 2)]),
        head=tuple(stream[at("post_forward", last) + 1 : at("pre_backward", last)]),
        layer_backward=relative(stream[at("pre_backward", 1) : at("pre_backward", 0)]),
        after=tuple(stream[at("post_backward", 0) :]),
    )


def _without(prefix: str, name: str) -> str:
    if name != prefix and not name.startswith(prefix + "."):
        raise AssertionError(f"{name} is used within {prefix}")
    return name.removeprefix(prefix)


def _autocast_linear_layers(model: nn.Module, dtype: torch.dtype) -> None:
    """What ``torch.autocast``, which knows no meta device, does to linear layers: inputs are cast each time, and weights
    once in a forward. The copies of the weights are kept until its end, those for recomputation as long as they are used.
    Source: aten/src/ATen/autocast_mode.cpp (``cached_cast``)."""
    copies: dict[nn.Parameter, torch.Tensor] = {}
    object.__setattr__(model, _AUTOCAST, copies)

    def forward(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        weight = copies.get(linear.weight)
        if weight is None:
            weight = linear.weight.to(dtype)
            if torch._C._current_graph_task_id() == -1:  # not within backward
                copies[linear.weight] = weight
        return F.linear(x.to(dtype), weight, None if linear.bias is None else linear.bias.to(dtype))

    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = functools.partial(forward, module)
    model.config._hf_sdp_attention_dtype = dtype


def _flash_on_meta(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention that saves query, key, value, output and the logarithms of the sums, as the flash kernels of CPU and
    CUDA do; on the meta device PyTorch would take the path that saves the scores."""
    dtype = getattr(module.config, "_hf_sdp_attention_dtype", None)
    if dtype is not None:
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    output, _ = _aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, True, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _flash_on_meta)
