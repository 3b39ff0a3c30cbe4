"""What a step of one worker computes, traced on the meta device: bytes that live between two points, and FLOPs.

Forward and backward of the real (sub)network run without memory, on three layers (``recorder.py``). Layers of one
structure are alike, so a model of any depth is put together from pieces (:class:`Trace`) in ``memory.py``. A model with
two stacks (encoder and decoder) is traced whole: what all layers of the one read of the other lives until the last of
them.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from ..compat import checkpoint_activations, is_within_backward
from ..engine.frozen import let_inputs_need_gradients
from ..errors import SDPConfigError
from ..families import Structure
from ..families.attention import set_attention
from ..model.backward_masking import mask_weight_gradients
from ..model.cut import cut
from ..model.state import Cursor, Run
from ..plan.groups import ROOT, shardable_modules
from ..plan.plan import Plan
from ..plan.subnetwork import subnetwork_of, whole_model
from ..plan.units import MaskableModule
from ..workload import Dtype, Workload
from .attention import ATTENTION
from .batch import training_batch
from .grouped_products import grouped_products_on_meta
from .recorder import Mark, Recorder, Segment, watch
from .shallow import shallow_model
from .shapes import ModelShapes

TRACED_LAYERS = 3  # one in the middle, with a layer on both sides
_AUTOCAST = "_hf_sdp_autocast"

Stream = tuple[Segment | Mark, ...]


@dataclass(frozen=True)
class Trace:
    """One step in pieces, in the order of the fields; names in the pieces of a layer are relative to it.

    Attributes:
        before: up to the first decoder layer; the whole step of a model with several stacks.
        first_forward: forward of the first layer, whose inputs may need no gradients.
        layer_forward: forward of any other layer.
        to_second_layer, to_next_layer: between the first layer and the second, and other neighbours: inputs are freed,
            except for the first layer's, which transformers keeps.
        head: from the last layer to its backward.
        layer_backward: backward of any layer but the first.
        first_backward: backward of the first layer.
        after: after the first layer's backward.
    """

    before: Stream
    first_forward: Stream = ()
    layer_forward: Stream = ()
    to_second_layer: Stream = ()
    to_next_layer: Stream = ()
    head: Stream = ()
    layer_backward: Stream = ()
    first_backward: Stream = ()
    after: Stream = ()


_cache: dict[tuple, Trace] = {}


def trace(shapes: ModelShapes, workload: Workload, *, as_stored: bool = False) -> tuple[list[Trace], Trace]:
    """For each layer the trace of the full model, and one for what is outside of the layers; of a model with several
    stacks no layers, and one for all. Kept: asking again costs nothing.

    Args:
        as_stored: parameters keep the dtypes in which they are stored. Where those that learn have another than
            ``workload.dtype``, linear layers and attention compute in that, as under ``torch.autocast``. Else
            everything is in that dtype.
    """
    dtypes = (workload.param_dtype, workload.dtype_of_frozen) if as_stored else (workload.dtype, workload.dtype)

    def prepare(model: PreTrainedModel, structure: Structure) -> list[str]:
        _cast(model, *dtypes)
        if dtypes[0] != workload.dtype:
            _autocast_linear_layers(model, getattr(torch, workload.dtype))
        return [*structure.layers, ROOT]

    def traced(*chosen: int) -> Trace:
        return _cached(shapes, workload, chosen, dtypes, prepare)

    types = shapes.layer_types
    if shapes.is_traced_whole:
        return [], traced(*range(len(types)))
    alike = {of_type: traced(layer, layer, layer) for of_type, layer in _first(types).items()}
    layers = [alike[of_type] for of_type in types]
    return layers, layers[0]


def trace_subnetwork(shapes: ModelShapes, workload: Workload, plan: Plan, index: int) -> tuple[list[Trace], Trace]:
    """For each layer the trace of subnetwork ``index`` in a model whose layers are all like it.

    Layers of one structure, of whatever plan, are traced once.
    Returns: as :func:`trace`.
    """
    layers = shapes.structure.layers
    of_layer: list[tuple] = [(of_type,) for of_type in shapes.layer_types]
    for module, structure_of_module in _structures(plan, index):
        of_layer[module.layer] += (module.kind, structure_of_module)

    def traced(*chosen: int) -> Trace:
        def prepare(model: nn.Module, structure: Structure) -> list[str]:
            _cast(model, workload.dtype, workload.dtype)
            few = _plan_of_layers(plan, [layers[i] for i in chosen], model, structure)
            if plan.masking == "backward":
                mask_weight_gradients(model, few, Cursor(index), [index])
                return shardable_modules(whole_model(few), structure)
            subnetwork = subnetwork_of(few, index)
            cut(model, subnetwork, structure, Run(Cursor(index), evaluates_full=False))
            if not plan.is_full:
                let_inputs_need_gradients(model, structure.layers)
            return shardable_modules(subnetwork, structure)

        structures = (plan.level, plan.masking, plan.is_full, *(of_layer[i] for i in chosen))
        return _cached(shapes, workload, chosen, structures, prepare)

    if shapes.is_traced_whole:
        return [], traced(*range(len(of_layer)))
    alike = {structure: traced(layer, layer, layer) for structure, layer in _first(of_layer).items()}
    if plan.level == "neuron":  # every layer has something of everything
        return [alike[structure] for structure in of_layer], alike[of_layer[-1]]
    # What is freed after the last layer depends on what the first one saves (the embedded tokens). It also depends on
    # whether any has attention, and so saves the rotary embeddings.
    attends = [m.layer for m in plan.modules if m.of_kind.attends and plan.held_runs(m, index)]
    return [alike[structure] for structure in of_layer], traced(0, attends[0] if attends else 0, len(of_layer) - 1)


def _first(structures: Sequence[Hashable]) -> dict[Hashable, int]:
    """Of each structure the number of the first layer that has it."""
    return {structure: structures.index(structure) for structure in structures}


def _structures(plan: Plan, index: int) -> Iterator[tuple[MaskableModule, tuple]]:
    """All that the computation of each module depends on, beside the model and the plan's level and masking."""
    if plan.masking == "backward":
        for module in plan.modules:
            yield module, tuple(last - first for first, last, _ in plan.held_runs(module, index))
    else:
        for local in subnetwork_of(plan, index).modules:
            yield local.module, (*(part.part.numel for part in local.parts), local.has_parts)


def _cached(shapes: ModelShapes, workload: Workload, chosen: tuple[int, ...], structure: tuple, prepare) -> Trace:
    """``prepare(model, structure)`` changes a model on the meta device that has the layers of these numbers, and names
    the modules to watch. ``structure``: what decides the result, beside the types of these layers."""
    key = (
        shapes.key,
        *(workload.batch, workload.sequence, workload.dtype, workload.gradient_checkpointing),
        tuple(shapes.layer_types[index] for index in chosen),
        structure,
    )
    if key not in _cache:
        model, names = shallow_model(shapes, chosen)
        watched = prepare(model, names)
        stream = _trace_stream(model, workload, watched)
        _cache[key] = Trace(tuple(stream)) if shapes.is_traced_whole else _cut(stream, names.layers)
    return _cache[key]


def _cast(model: nn.Module, learned: Dtype, frozen: Dtype) -> None:
    for p in model.parameters():  # not the buffers: rotary frequencies stay float32
        p.data = p.data.to(getattr(torch, learned if p.requires_grad else frozen))


def _plan_of_layers(plan: Plan, chosen: list[str], model: nn.Module, structure: Structure) -> Plan:
    """A plan for ``model``, whose layers are held as those of the names ``chosen`` are in ``plan``."""
    modules, unit_holders = [], {}
    for index, (old, new) in enumerate(zip(chosen, structure.layers, strict=True)):
        for module in (m for m in plan.modules if m.name == old or m.name.startswith(old + ".")):
            alike = module.renamed(old, new, index)
            modules.append(alike)
            unit_holders[alike.name] = plan.unit_holders[module.name]
    return Plan.of_units(
        level=plan.level,
        masking=plan.masking,
        num_subnetworks=plan.num_subnetworks,
        always_held=(),
        shapes={name: tuple(p.shape) for name, p in model.named_parameters()},
        modules=tuple(modules),
        unit_holders=unit_holders,
    )


def _trace_stream(model: PreTrainedModel, workload: Workload, watched: Iterable[str]) -> list[Segment | Mark]:
    """One step of a model on the meta device. It is not to be used any more."""
    for module in model.modules():
        if (config := getattr(module, "config", None)) is not None:
            config.use_cache = False  # each stack may have its own
    if model.config._attn_implementation != "eager":  # as of models whose scores no kernel computes
        with contextlib.suppress(ValueError):  # those that have their own
            set_attention(model, ATTENTION)
    if workload.gradient_checkpointing:
        checkpoint_activations(model)
    model.train()
    inputs = training_batch(model, workload.batch, workload.sequence)
    recorder = Recorder([*model.parameters(), *model.buffers(), *inputs.values()])
    watch(model, watched, recorder)
    with recorder, grouped_products_on_meta():
        loss = _loss(model, inputs)
        vars(model).get(_AUTOCAST, {}).clear()  # as autocast does when it is left
        recorder.mark("end_of_forward", "")
        loss.backward()
        del loss
        recorder.mark("end", "")
    return recorder.stream


def _loss(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    try:
        return model(**inputs).loss
    except Exception as error:  # whatever the class says
        raise SDPConfigError(
            f"A step of {type(model).__name__} cannot be estimated: on the meta device it raises "
            f"{type(error).__name__}: {error}"
        ) from error


def _cut(stream: list[Segment | Mark], layers: tuple[str, ...]) -> Trace:
    def at(kind: str, layer: int) -> int:
        return stream.index(Mark(kind, layers[layer]))

    def relative(piece: list[Segment | Mark], layer: int = 1) -> Stream:
        own = layers[layer]
        result: list[Segment | Mark] = []
        for item in piece:
            if isinstance(item, Mark):
                result.append(Mark(item.kind, _without(own, item.module)))
            else:
                result.append(
                    dataclasses.replace(item, gradients={_without(own, n): b for n, b in item.gradients.items()})
                )
        return tuple(result)

    last = TRACED_LAYERS - 1
    end = at("post_backward", 0) if Mark("post_backward", layers[0]) in stream else stream.index(Mark("end", ""))
    return Trace(
        before=tuple(stream[: at("pre_forward", 0)]),
        first_forward=relative(stream[at("pre_forward", 0) : at("post_forward", 0) + 1], 0),
        layer_forward=relative(stream[at("pre_forward", 1) : at("post_forward", 1) + 1]),
        to_second_layer=tuple(stream[at("post_forward", 0) + 1 : at("pre_forward", 1)]),
        to_next_layer=relative(stream[at("post_forward", 1) + 1 : at("pre_forward", 2)]),
        head=tuple(stream[at("post_forward", last) + 1 : at("pre_backward", last)]),
        layer_backward=relative(stream[at("pre_backward", 1) : at("pre_backward", 0)]),
        first_backward=relative(stream[at("pre_backward", 0) : end], 0),
        after=tuple(stream[end:]),
    )


def _without(prefix: str, name: str) -> str:
    if name != prefix and not name.startswith(prefix + "."):
        raise AssertionError(f"{name} is used within {prefix}")
    return name.removeprefix(prefix)


def _autocast_linear_layers(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """What ``torch.autocast``, which knows no meta device, does to linear layers.

    Inputs and frozen weights are cast each time, other weights once in a forward. The copies of these are kept until
    its end. Those for recomputation are kept as long as they are used. Source: aten/src/ATen/autocast_mode.cpp
    (``cached_cast``).
    """
    copies: dict[torch.Tensor, torch.Tensor] = {}
    object.__setattr__(model, _AUTOCAST, copies)

    def forward(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        weight = copies.get(linear.weight)
        if weight is None:
            weight = linear.weight.to(dtype)
            if linear.weight.requires_grad and not is_within_backward():
                copies[linear.weight] = weight
        return F.linear(x.to(dtype), weight, None if linear.bias is None else linear.bias.to(dtype))

    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = functools.partial(forward, module)  # type: ignore[method-assign]
    model.config._hf_sdp_attention_dtype = dtype
