"""Every supported model type: its layers are of the structure that its family says, and its gradients are right."""

import inspect
import re

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from hf_sdp import SDPConfig, make_plan, patch_model
from hf_sdp.families.pre_norm import MODEL_TYPES
from hf_sdp.model.state import get_state
from tests.support.models import VOCAB, batch

TINY = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=8,
    num_key_value_heads=4, head_dim=4, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0,
)  # fmt: skip
MULTIPLIED = {"granite": " * self.residual_multiplier"}
"""What the branches are multiplied by."""
LEVELS = {
    "neuron": dict(level="neuron"),
    "several parts": dict(level="neuron", coverage=0.75),
    "block": dict(level="block"),
    "layer": dict(level="block", block_granularity="layer"),
}


def tiny(model_type: str):
    """A tiny config, without layers that are special by the sizes of the large ones."""
    known = CONFIG_MAPPING[model_type]()
    return CONFIG_MAPPING[model_type](**{name: value for name, value in TINY.items() if hasattr(known, name)})


def model_of(model_type: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny(model_type))
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape))
    return model.train()


def computation(layer_class: type) -> str:
    """What a decoder layer does, from the first residual on, without comments."""
    forward = inspect.unwrap(layer_class.__dict__["forward"])
    forward = inspect.getclosurevars(forward).nonlocals.get("forward", forward)
    source = re.sub(r"\s+", " ", re.sub(r"#.*", "", inspect.getsource(forward)))
    return source[source.index("residual = hidden_states") :]


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_layers_compute_what_the_family_says(model_type):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny(model_type))
    found = computation(type(model.model.layers[0]))
    assert found.replace(MULTIPLIED.get(model_type, "\0"), "") == computation(LlamaDecoderLayer)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_gradients_equal_those_of_the_dense_model_with_what_is_not_held_zeroed(model_type, level):
    config = SDPConfig(**LEVELS[level])
    plan = make_plan(tiny(model_type), config, 4)
    kinds = {module.kind for module in plan.modules}
    assert kinds == ({"layer"} if level == "layer" else {"attention", "mlp"})
    for rank in (0, 3):
        dense = model_of(model_type)
        with torch.no_grad():
            for name, slices in plan.slices.items():
                for s in slices:
                    if rank not in s.holders:
                        dense.get_parameter(name).narrow(s.dim, s.start, s.stop - s.start).zero_()
        expected = dense(**batch(3), use_cache=False)
        expected.loss.backward()
        model = patch_model(model_of(model_type), config, rank=rank, world_size=4).train()
        found = model(**batch(3))
        found.loss.backward()
        torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
        assert sum(p.numel() for p in model.parameters()) == plan.numel(rank) < plan.full_numel
        for local_name, p in model.named_parameters():
            region = get_state(model).held.subnetwork.tensors[local_name].region
            torch.testing.assert_close(
                p.grad, region.of(dense.get_parameter(region.name).grad), rtol=1e-4, atol=1e-6, msg=local_name
            )
