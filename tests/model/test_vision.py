"""Models for images: stages of layers, whose blocks are found, left out and cut; the gradients are right."""

import re

import pytest
import torch
import transformers

from hf_sdp import SDPConfig, make_plan, patch_model
from hf_sdp.bench.support.check import check
from hf_sdp.bench.support.models import made, tiny_batch, tiny_model
from hf_sdp.bench.support.tiny import tiny_config
from hf_sdp.families import structure_of

TASK = "image classification"
SHORT = ("convnext", "resnet", "swin")
TYPES = [
    pytest.param(name, marks=() if name in SHORT else pytest.mark.long)
    for name in ("clip", "convnext", "deit", "dinov2", "resnet", "swin", "swinv2", "vit")
]
MASKINGS = ("forward", "backward")


def on_meta(config):
    with torch.device("meta"):
        return made(config, TASK)


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("granularity", ["sub-block", pytest.param("layer", marks=pytest.mark.long)])
@pytest.mark.parametrize("masking", MASKINGS)
def test_blocks_that_are_not_held_add_nothing(model_type, granularity, masking):
    sdp = SDPConfig(level="block", block_granularity=granularity, masking=masking)
    plan = check(tiny_config(model_type), TASK, sdp)
    assert plan.numel(0) < plan.full_numel


@pytest.mark.parametrize("model_type", ["beit", "convnext", "dinov2", "swin"])
def test_a_layer_that_drops_whole_samples_trains_without_its_blocks(model_type):
    """It asks for the number of samples of what a block returns, in training only."""
    config = tiny_config(model_type, drop_path_rate=0.5)
    for rank in range(2):
        model = patch_model(tiny_model(config, TASK), SDPConfig(level="block"), rank=rank, world_size=2)
        model(**tiny_batch(model, task=TASK)).loss.backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "layernorm" in name or "norm1" in name)


@pytest.mark.parametrize("model_type", [t for t in TYPES if t.values[0] != "resnet"])
@pytest.mark.parametrize("masking", MASKINGS)
def test_heads_and_neurons(model_type, masking):
    plan = check(tiny_config(model_type), TASK, SDPConfig(level="neuron", masking=masking))
    kinds = {module.kind for module in plan.modules}
    assert kinds == ({"mlp"} if model_type == "convnext" else {"attention", "mlp"})


CONVOLUTIONS = {
    "bottleneck": dict(model_type="resnet"),
    "basic": dict(model_type="resnet", layer_type="basic"),
    "groups": dict(model_type="regnet"),
    "depthwise": dict(model_type="mobilenet_v2", depth_multiplier=0.25),
    "biases": dict(model_type="poolformer"),
    "depthwise after a linear layer": dict(model_type="segformer"),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("masking", MASKINGS)
@pytest.mark.parametrize("coverage", [pytest.param(0.5, marks=pytest.mark.long), 0.75])
def test_channels_of_convolutions_with_their_norms(name, masking, coverage):
    sdp = SDPConfig(level="neuron", masking=masking, coverage=coverage)
    plan = check(tiny_config(**CONVOLUTIONS[name]), TASK, sdp, world=4, ranks=(0, 3))
    cut = {name for module in plan.modules for name in module.dims if module.kind == "mlp"}
    assert any(len(plan.shapes[name]) == 4 for name in cut)
    norms = {name for name in cut if ".normalization." in name}
    assert bool(norms) == (CONVOLUTIONS[name]["model_type"] not in ("poolformer", "segformer"))


@pytest.mark.parametrize(
    ("config", "where"),
    [
        (transformers.ResNetConfig(depths=[3, 4, 6, 3]), r"resnet\.encoder\.stages\.\d\.layers\.0$"),
        (transformers.ResNetConfig(depths=[2] * 4, hidden_sizes=[64, 128, 256, 512], layer_type="basic"),
         r"resnet\.encoder\.stages\.[123]\.layers\.0$"),
    ],
    ids=["resnet-50", "resnet-18"],
)  # fmt: skip
def test_layers_whose_shortcut_changes_the_shape_are_held_by_all(config, where):
    structure = structure_of(on_meta(config))
    assert len(structure.layers) == sum(config.depths)
    kept = {layer for layer in structure.layers if layer in structure.kept}
    assert kept == {layer for layer in structure.layers if re.search(where, layer)}
    assert {block.layer for block in structure.blocks} == {
        index for index, layer in enumerate(structure.layers) if layer not in kept
    }
    assert "no operand of a sum is what the others are computed from" in structure.kept[min(kept)]


CONFIGS = {
    "swin-t": transformers.SwinConfig(),
    "convnext-t": transformers.ConvNextConfig(),
    "resnet-50": transformers.ResNetConfig(),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("workers", [2, 8])
def test_every_stage_is_balanced(name, workers):
    """Blocks of different stages differ by factors of 4 in bytes: a count over all of them balances nothing."""
    model = on_meta(CONFIGS[name])
    plan, structure = make_plan(model, SDPConfig(level="block"), workers), structure_of(model)
    stages: dict[tuple, list[int]] = {}
    for module in plan.modules:
        of_stage = stages.setdefault((module.kind, structure.stage(module.layer)), [0] * workers)
        for worker in plan.unit_holders[module.name][0]:
            of_stage[worker] += 1
    assert len(stages) >= 4
    assert all(max(counts) - min(counts) <= 1 for counts in stages.values())
    sizes = [plan.numel(worker) - plan.shared_numel for worker in range(workers)]
    heaviest = max(module.numel(plan.shapes) for module in plan.modules)
    assert max(sizes) - min(sizes) <= heaviest
    assert len(plan.holder_sets) <= 10
