"""Models that ``patch_model`` and ``make_plan`` refuse, and unusual ones that are right."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
)

from hf_sdp import SDPConfig, consolidate, make_plan, patch_model
from hf_sdp.model.state import get_state
from tests.support.models import batch, tiny_config, tiny_model
from tests.support.refusal import assert_refused

WORLD = dict(rank=0, world_size=4)
LEVELS = ("neuron", "block")


def changed(change, **options):
    """A function that makes a model and then changes it."""

    def make():
        model = tiny_model(**options)
        result = change(model)
        return model if result is None else result

    return make


def parameter(path: str, value):
    def change(model):
        owner, _, name = path.rpartition(".")
        setattr(model.get_submodule(owner), name, value)

    return change


def config(**values):
    return lambda model: [setattr(model.config, name, value) for name, value in values.items()] and None


def tie_by_hand(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def untie_by_hand(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())


def share_a_projection(model):
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def share_an_mlp(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def share_a_layer(model):
    model.model.layers[3] = model.model.layers[0]


def rename(model):
    model.model.layers[0].feed_forward = model.model.layers[0].mlp
    del model.model.layers[0].mlp


def drop_a_layer(model):
    del model.model.layers[-1]


def empty_mlp(model):
    model.model.layers[1].mlp = nn.Module()


def identity(model):
    model.model.layers[1].self_attn = nn.Identity()


def no_layers(model):
    model.model.layers = nn.ModuleList()


def extra(model):
    model.scale = nn.Parameter(torch.ones(3))


def wider(model):
    model.model.layers[2].mlp.up_proj = nn.Linear(32, 80, bias=False)


def with_bias(model):
    model.model.layers[2].mlp.up_proj.bias = nn.Parameter(torch.zeros(64))


def no_bias(model):
    model.model.layers[0].self_attn.q_proj.bias = None


def half_a_norm(model):
    model.model.layers[0].post_attention_layernorm.half()


def integers(model):
    for name in ("up_proj", "down_proj"):
        linear = model.model.layers[0].mlp.get_submodule(name)
        linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)


def no_head(model):
    model.lm_head = nn.Identity()


class Scaled(LlamaModel):
    """With a parameter without dims."""

    def __init__(self, config):
        super().__init__(config)
        self.scale = nn.Parameter(torch.ones(()))


class NeedsMore(LlamaModel):
    def __init__(self, config, width):
        super().__init__(config)
        self.extra = nn.Linear(width, width)


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def patched(model):
    return patch_model(model, SDPConfig(), **WORLD)


def compile_in_place(model):
    model.compile(backend="eager")


def compile_a_layer(model):
    model.model.layers[1].compile(backend="eager")


def compiled_layer(model):
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")


def peft(model):
    model._hf_peft_config_loaded = True  # set by model.add_adapter


def on_meta(model):
    model.to("meta")


def partly_on_meta(model):
    model.model.layers[0].mlp.to("meta")


MOBILENET = MobileNetV1Config(depth_multiplier=0.25, architectures=["MobileNetV1ForImageClassification"])
REFUSED = {
    "None": (lambda: None, "transformers model.*NoneType"),
    "text": (lambda: "llama-7b", "transformers model.*str"),
    "config": (tiny_config, "transformers model.*LlamaConfig"),
    "class": (lambda: LlamaModel, "transformers model"),
    "linear": (lambda: nn.Linear(2, 2), "transformers model.*Linear"),
    "list of parameters": (lambda: nn.ParameterList([nn.Parameter(torch.ones(2))]), "transformers model"),
    "another family": (
        lambda: MobileNetV1ForImageClassification(MOBILENET),
        "MobileNetV1.*mobilenet_v1.*has no stack of layers",
    ),
    "wrapped": (changed(Wrapper), "Patch before wrapping"),
    "DataParallel": (changed(nn.DataParallel), "Patch before wrapping"),
    "in a sequence": (changed(nn.Sequential), "Patch before wrapping"),
    "torch.compile": (changed(lambda m: torch.compile(m, backend="eager")), "compiled.*Patch first"),
    "compiled in place": (changed(compile_in_place), "LlamaForCausalLM is compiled"),
    "a layer compiled in place": (changed(compile_a_layer), "model.layers.1 is compiled"),
    "a compiled layer": (changed(compiled_layer), "model.layers.1 is compiled"),
    "patched": (changed(patched), "already patched"),
    "patched and wrapped": (changed(lambda m: Wrapper(patched(m))), "already patched|Patch before wrapping"),
    "PEFT": (changed(peft), "peft.get_peft_model"),
    "meta": (changed(on_meta), "meta device"),
    "partly meta": (changed(partly_on_meta), "layers.0.mlp.*meta device"),
    "quantized": (changed(lambda m: setattr(m, "is_quantized", True)), "Quantized"),
    "8 bit": (changed(lambda m: setattr(m, "is_loaded_in_8bit", True)), "Quantized"),
    "4 bit": (changed(lambda m: setattr(m, "is_loaded_in_4bit", True)), "Quantized"),
    "a quantizer": (changed(lambda m: setattr(m, "hf_quantizer", object())), "Quantized"),
    "quantization_config": (changed(config(quantization_config={"bits": 4})), "Quantized"),
    "device_map": (changed(lambda m: setattr(m, "hf_device_map", {"": 0})), "device_map"),
    "tied by hand": (changed(tie_by_hand), "lm_head.weight.*tie_word_embeddings"),
    "untied by hand": (changed(untie_by_hand, tie_word_embeddings=True), "lm_head.weight.*tie_word_embeddings"),
    "a shared projection": (changed(share_a_projection), "layers.1.mlp.up_proj.weight.*that of model.layers.0"),
    "a shared MLP": (changed(share_an_mlp), "layers.1.mlp.*that of model.layers.0"),
    "a shared layer": (changed(share_a_layer), "layers.3.*that of model.layers.0"),
    "a renamed module": (changed(rename), "layers.0.feed_forward"),
    "a layer less": (changed(drop_a_layer), "layers.3.*is not there"),
    "no layers": (changed(no_layers), "layers.0.*is not there"),
    "an empty MLP": (changed(empty_mlp), "layers.1.mlp.*is not there"),
    "no attention": (changed(identity), "layers.1.self_attn.*is not there"),
    "a parameter more": (changed(extra), r"scale has shape \(3,\)"),
    "a bias more": (changed(with_bias), "layers.2.mlp.up_proj.bias"),
    "a bias less": (changed(no_bias, attention_bias=True), "layers.0.self_attn.q_proj.bias is not there"),
    "a wider layer": (changed(wider), r"up_proj.weight has shape \(80, 32\)"),
    "no head": (changed(no_head), "lm_head.weight is not there"),
    "config: width": (changed(config(intermediate_size=128)), r"shape \(32, 64\).*shape \(32, 128\)"),
    "config: heads": (changed(config(num_key_value_heads=2)), "k_proj"),
    "config: vocabulary": (changed(config(vocab_size=65)), r"lm_head.weight has shape \(64, 32\).*\(65, 32\)"),
    "config: layers": (changed(config(num_hidden_layers=3)), "layers.3"),
    "config: nonsense": (changed(config(hidden_act="magic")), "cannot be made of its config alone"),
    "config: None": (changed(lambda m: setattr(m, "config", None)), "config"),
    "a dtype of its own": (changed(half_a_norm), "need one dtype.*float16"),
    "layers at random": (changed(config(decoder_layerdrop=0.1)), "decoder_layerdrop=0.1 of LlamaConfig.*Set it to 0"),
    "integers": (changed(integers), "int8"),
    "no dims": (lambda: Scaled(tiny_config()), r"scale has no dimension.*\(1,\)"),
    "another constructor": (lambda: NeedsMore(tiny_config(), 4), "NeedsMore cannot be made of its config alone"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_changed(case):
    make, message = REFUSED[case]
    for level in LEVELS:
        model = make()
        assert_refused(message, lambda m=model, at=level: patch_model(m, SDPConfig(level=at), **WORLD), model)


@pytest.mark.parametrize("case", ["None", "text", "class", "linear", "another family", "wrapped", "patched"])
def test_no_plan_is_made_of(case):
    make, message = REFUSED[case]
    model = make()
    assert_refused(message, lambda: make_plan(model, SDPConfig(), 4), model)


def test_no_plan_is_made_of_a_config_of_another_family():
    assert_refused("MobileNetV1.*mobilenet_v1.*has no stack of layers", lambda: make_plan(MOBILENET, SDPConfig(), 4))


SMALL = dict(num_attention_heads=4, num_key_value_heads=1)
RIGHT = {
    "bfloat16": (changed(lambda m: m.bfloat16()), {}),
    "float64": (changed(lambda m: m.double()), {}),
    "frozen": (changed(lambda m: m.requires_grad_(False)), {}),
    "resized": (changed(lambda m: m.resize_token_embeddings(80, mean_resizing=False) and None), {}),
    "without a head": (lambda: LlamaModel(tiny_config()), {}),
    "a classifier": (lambda: LlamaForSequenceClassification(tiny_config(num_labels=3, pad_token_id=0)), {}),
    "a copy": (changed(copy.deepcopy), {}),
    "in eval mode": (changed(lambda m: m.eval()), {}),
    "one key/value head, blocks": (lambda: tiny_model(**SMALL), dict(level="block")),
    "one key/value head, everything": (lambda: tiny_model(**SMALL), dict(coverage=1.0)),
}  # fmt: skip


@pytest.mark.parametrize("case", RIGHT)
def test_unusual_and_right(case):
    """A worker has what the plan says, in the dtype it was, and of the same values."""
    make, options = RIGHT[case]
    model = make()
    values, dtypes = {n: p.detach().clone() for n, p in model.named_parameters()}, {p.dtype for p in model.parameters()}
    plan = make_plan(model, SDPConfig(**options), 4)
    patch_model(model, SDPConfig(**options), **WORLD)
    assert {p.dtype for p in model.parameters()} == dtypes
    assert sum(p.numel() for p in model.parameters()) == plan.numel(0)
    for local_name, tensor in get_state(model).held.subnetwork.tensors.items():
        assert torch.equal(model.get_parameter(local_name), tensor.region.of(values[tensor.region.name])), local_name


@pytest.mark.parametrize("options", [dict(), dict(coverage=0.75)], ids=str)
def test_with_one_key_value_head_the_query_heads_are_cut(options):
    model = patch_model(tiny_model(**SMALL), SDPConfig(**options), **WORLD)
    attention, held = model.model.layers[0].self_attn, round(4 * options.get("coverage", 0.5))
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (8 * held, 8)
    assert attention.o_proj.in_features == 8 * held


def test_a_simulation_needs_no_sharding():
    """Parameters without dims and of several dtypes stay whole in one process."""
    model = Scaled(tiny_config())
    patch_model(model, SDPConfig(simulate=4))
    assert model(input_ids=batch(0)["input_ids"]).last_hidden_state.isfinite().all()
    mixed = tiny_model()
    mixed.lm_head.bfloat16()
    patch_model(mixed, SDPConfig(simulate=4))
    assert consolidate(mixed)["lm_head.weight"].dtype == torch.bfloat16


def test_a_config_alone_is_no_model_to_patch_but_one_to_plan():
    assert (
        make_plan(LlamaConfig(**tiny_config().to_dict()), SDPConfig(), 4).hash
        == make_plan(tiny_model(), SDPConfig(), 4).hash
    )
