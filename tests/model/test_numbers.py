"""What a patched model says of its size is what the full model says, whatever a worker has of it."""

import pytest
from torch import nn

import hf_sdp
from hf_sdp import SDPConfig, local_num_parameters, patch_model
from tests.support.models import tiny_model

WAYS = [dict(only_trainable=a, exclude_embeddings=b) for a in (False, True) for b in (False, True)]
MODELS = {
    "llama": {},
    "tied": dict(tie_word_embeddings=True),
    "frozen embeddings": {},
    "biases that are shared, in several parts": dict(model_type="gpt2"),
    "embeddings that are cut": dict(model_type="t5", task="sequence to sequence"),
    "fused experts": dict(model_type="mixtral", task="causal"),
    "convolutions": dict(model_type="resnet", task="image classification"),
}


def numbers(model) -> list[int]:
    return [*(model.num_parameters(**way) for way in WAYS), *map(model.get_memory_footprint, (True, False))]


@pytest.mark.parametrize("options", [dict(level="block"), dict(level="neuron", coverage=0.75)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_numbers_are_those_of_the_full_model(name, options):
    full = tiny_model(**MODELS[name])
    model = tiny_model(**MODELS[name])
    if name == "frozen embeddings":
        full.get_input_embeddings().requires_grad_(False)
        patch_model(model, SDPConfig(**options), rank=1, world_size=4).get_input_embeddings().requires_grad_(False)
    else:
        patch_model(model, SDPConfig(**options), rank=1, world_size=4)
    assert numbers(model) == numbers(full)
    found = [local_num_parameters(model, **way) for way in WAYS]
    assert found[0] == sum(p.numel() for p in model.parameters()) < full.num_parameters()
    of_embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    assert found[0] - found[1] == sum(p.numel() for p in of_embeddings)
    assert found[2] == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("options", [dict(masking="backward"), dict(coverage=1.0)], ids=str)
def test_a_model_that_is_whole_says_what_it_said(options):
    model = patch_model(tiny_model(), SDPConfig(**options), rank=1, world_size=4)
    assert numbers(model) == numbers(tiny_model())
    assert local_num_parameters(model) == tiny_model().num_parameters()


@pytest.mark.parametrize("quantized", [None, {}], ids=["dense", "in four bits"])
def test_what_peft_says_is_of_the_full_model(quantized, capsys):
    pytest.importorskip("peft")
    if quantized is not None:
        pytest.importorskip("bitsandbytes")
    made = dict(lora={}, quantized=quantized)
    full = tiny_model(**made)
    model = patch_model(tiny_model(**made), SDPConfig(level="block"), rank=0, world_size=2)
    assert model.get_nb_trainable_parameters() == full.get_nb_trainable_parameters()
    full.print_trainable_parameters()
    model.print_trainable_parameters()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1]
    assert local_num_parameters(model, only_trainable=True) < full.num_parameters(only_trainable=True)


def test_a_model_that_is_not_patched_has_no_subnetwork():
    with pytest.raises(hf_sdp.SDPConfigError, match="is not patched"):
        local_num_parameters(tiny_model())
