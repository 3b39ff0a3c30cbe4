"""Estimates of models of which little learns, against what real engines store, allocate and send."""

import json

import pytest
import torch
from torch import nn

from hf_sdp import SDPConfig, SDPConfigError, Workload, make_plan
from hf_sdp.bench.predicted import predicted_step
from hf_sdp.cli import main
from hf_sdp.estimate.memory import fsdp_step, sdp_step
from tests.support.estimates import compare
from tests.support.models import SMALL, tiny_config, tiny_model, with_adapters

pytest.importorskip("peft")

SIZES = {**SMALL, "num_key_value_heads": 4}
QLORA_LIKE = dict(dtype="bfloat16", frozen_dtype="bfloat16")
SOME_LAYERS = dict(layers_to_transform=[1, 3], target_modules=["q_proj", "down_proj"])
WORLD, RANK = 4, 2


def engine_of(said: str | dict) -> str | SDPConfig:
    return said if isinstance(said, str) else SDPConfig(**said)


@pytest.mark.parametrize(
    ("engine", "lora", "formats"),
    [
        ("DDP", {}, QLORA_LIKE),
        ("DDP", {}, dict(dtype="bfloat16", gradient_checkpointing=True)),
        ("FSDP2", {}, {}),
        ("FSDP2, no reshard", SOME_LAYERS, {}),
        (dict(level="block"), {}, {}),
        (dict(level="block", reshard_after_forward=True), SOME_LAYERS, {}),
        (dict(coverage=0.75), dict(use_dora=True, modules_to_save=["lm_head"]), {}),
        (dict(sharding="none", param_dtype="bfloat16"), {}, QLORA_LIKE),
        (dict(level="block", masking="backward"), {}, {}),
        (dict(masking="backward", param_dtype="bfloat16"), {}, QLORA_LIKE),
    ],
    ids=str,
)
def test_adapters_are_predicted_as_they_are_measured(engine, lora, formats):
    engine = engine_of(engine)
    workload = Workload(batch=2, sequence=128, **formats)
    base = tiny_model(**SIZES).to(getattr(torch, workload.dtype_of_frozen))
    model = with_adapters(base, r=8, **lora)
    compare(predicted_step(model, engine, workload, WORLD, RANK), model, engine, workload, WORLD, RANK)


@pytest.mark.parametrize("engine", ["FSDP2", dict(level="block"), dict(masking="backward")], ids=str)
def test_so_is_what_is_frozen_without_adapters(engine):
    engine = engine_of(engine)
    model, workload = tiny_model(**SIZES), Workload(batch=2, sequence=128)
    for frozen in (model.model.embed_tokens, *model.model.layers[:2]):
        frozen.requires_grad_(False)
    compare(predicted_step(model, engine, workload, WORLD, RANK), model, engine, workload, WORLD, RANK)


def test_frozen_experts_keep_no_tokens():
    engine, workload = SDPConfig(level="block"), Workload(batch=2, sequence=128)
    model = tiny_model(model_type="mixtral", **SIZES)
    for layer in model.model.layers:
        layer.mlp.experts.requires_grad_(False)
    compare(predicted_step(model, engine, workload, WORLD, RANK), model, engine, workload, WORLD, RANK)


def test_quantized_parameters_are_refused_by_name():
    model = with_adapters(tiny_model(**SIZES))
    packed = nn.Parameter(torch.zeros(128, 64, dtype=torch.uint8), requires_grad=False)
    model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight = packed
    with pytest.raises(SDPConfigError, match="layers.1.mlp.up_proj.base_layer.weight is a Parameter of torch.uint8"):
        fsdp_step(model, Workload(batch=1, sequence=16), WORLD)


def test_frozen_weights_have_no_flops_of_gradients():
    """Two thirds of those of weights that learn. Where nothing before the first layer learns, nor have its inputs."""
    workload = Workload(batch=2, sequence=64)
    model = with_adapters(tiny_model(**SMALL, num_key_value_heads=8, num_hidden_layers=2), r=8)

    def numel(module: nn.Module, learns: bool) -> int:
        weights = (p for n, p in module.named_parameters() if p.dim() == 2 and "embed" not in n)
        return sum(p.numel() for p in weights if p.requires_grad is learns)

    attention = model.get_base_model().model.layers[0].self_attn
    first = [getattr(attention, name) for name in ("q_proj", "k_proj", "v_proj")]
    of_inputs = sum(numel(layer, False) + layer.lora_A["default"].weight.numel() for layer in first)
    of_weights = 4 * numel(model, False) + 6 * numel(model, True) - 2 * of_inputs
    scores = 2 * workload.batch * workload.sequence**2 * SMALL["hidden_size"] * 2
    assert fsdp_step(model, workload, WORLD).flops == of_weights * workload.tokens + 7 * scores


def test_a_full_plan_computes_what_plain_sharding_does():
    """Also after others of which a worker holds whole layers: inputs of their first layer need gradients."""
    workload, model = Workload(batch=2, sequence=32), with_adapters(tiny_model(**SIZES))
    flops = {
        coverage: predicted_step(model, SDPConfig(level="block", coverage=coverage), workload, WORLD).flops
        for coverage in (0.75, 1.0)
    }
    assert flops[0.75] < flops[1.0] == fsdp_step(model, workload, WORLD).flops


def test_what_fits_is_asked_of_the_model_with_its_adapters():
    workload, sdp = Workload(batch=1, sequence=16), SDPConfig(level="block")
    model = with_adapters(tiny_model(**SIZES))
    peaks = [sdp_step(model, make_plan(model, sdp, 2), worker, workload).memory.peak for worker in range(2)]
    capacities = SDPConfig(level="block", memory_gib=[max(peaks) / 2**30] * 2, workload=workload)
    assert make_plan(model, capacities, 2).coverage >= 0.5
    with pytest.raises(SDPConfigError, match="too little"):
        make_plan(tiny_config(**SIZES), capacities, 2)


def test_the_command_says_what_learns(capsys, tmp_path):
    tiny_config(**SIZES).save_pretrained(tmp_path)
    model = with_adapters(tiny_model(**SIZES), r=8, target_modules=["q_proj", "v_proj"])
    arguments = ["estimate", str(tmp_path), "-n", "4", "--lora-r", "8", "--lora-targets", "q_proj,v_proj"]
    main([*arguments, "--json"])
    report = json.loads(capsys.readouterr().out)
    ddp = next(engine for engine in report["engines"] if engine["engine"] == "DDP")
    assert report["learned_parameters"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert ddp["gradients_bytes"]["max"] == 4 * report["learned_parameters"]
    with pytest.raises(SystemExit) as ended:
        main([*arguments[:-1], "no_such_layer"])
    assert ended.value.code == 2 and "no_such_layer" in capsys.readouterr().err
