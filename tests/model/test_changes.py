"""What patching changes in a model's modules is taken back: what is left is the full model, without values."""

import pytest
import torch
from torch import nn

from hf_sdp import SDPConfig, patch_model
from hf_sdp.model.changes import recorded
from hf_sdp.model.state import get_state, unwrap
from tests.support.models import tiny_model
from tests.support.types import MODELS, short

MORE = {
    "llama, LoRA": dict(lora=dict(r=4)),
    "resnet": dict(task="image classification", model_type="resnet"),
    "swin": dict(task="image classification", model_type="swin"),
}
WAYS = [
    dict(level=level, masking=masking, coverage_schedule=[(0.0, 0.75), (0.5, 1.0)])
    for masking in ("forward", "backward")
    for level in ("neuron", "block")
]


def described(model: nn.Module) -> dict:
    """All that a model's modules are, but for values and for what hf_sdp keeps of a patched one."""
    result = {}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, dict):
                keys = list(value) if attribute in ("_parameters", "_buffers", "_modules") else set(value)
                result[name, attribute] = keys
            elif isinstance(value, int | float | str | bool | type(None)):
                result[name, attribute] = value
            else:
                result[name, attribute] = type(value)
        result[name, "class"] = type(module)
        for kind in ("_parameters", "_buffers"):
            for last, tensor in vars(module)[kind].items():
                if tensor is not None:
                    result[name, last] = (kind, tensor.shape, tensor.dtype, tensor.requires_grad)
    return result


@pytest.mark.parametrize("way", [*WAYS[:2], *(pytest.param(w, marks=pytest.mark.long) for w in WAYS[2:])], ids=str)
@pytest.mark.parametrize("name", short("gemma3_text", "t5", more=MORE))
def test_what_patching_changes_is_taken_back(name, way):
    options = (MODELS | MORE)[name]
    whole, untouched = tiny_model(**options), unwrap(tiny_model(**options))
    model, before = unwrap(whole), described(untouched)
    assert described(model) == before
    patch_model(whole, SDPConfig(**way), rank=1, world_size=4)
    assert described(model) != before
    get_state(model).schedule.changes.pop().take_back()
    after = described(model)
    assert {key: value for key, value in after.items() if before.get(key) != value} == {}
    assert before.keys() == after.keys()
    full = dict(untouched.named_parameters(remove_duplicate=False))
    taken_back = dict(model.named_parameters(remove_duplicate=False))
    assert list(taken_back) == list(full)
    assert [len(set(map(id, those.values()))) for those in (taken_back, full)] == [len({*map(id, full.values())})] * 2


def test_what_others_have_changed_since_stays():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
    own = [model[1].register_forward_hook(lambda *args: None)]
    with recorded(model) as changes:
        model[0].weight = nn.Parameter(torch.zeros(2, 4))
        model[0].out_features = 2
        own.append(model[0].register_forward_hook(lambda *args: None))
        own[0].remove()
        model.part = nn.Linear(1, 1)
    users = model[0].register_forward_hook(lambda *args: None)
    model[0].note, model[1].inplace, model.users = "the user's", True, nn.Identity()
    changes.take_back()
    assert model[0].weight.shape == (8, 4) and model[0].weight.is_meta and model[0].out_features == 8
    assert list(model._modules) == ["0", "1", "users"] and not hasattr(model, "part")
    assert list(model[0]._forward_hooks) == [users.id] and list(model[1]._forward_hooks) == [own[0].id]
    assert (model[0].note, model[1].inplace) == ("the user's", True)


def test_a_parameter_of_two_modules_is_one_again():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    with recorded(model) as changes:
        for module in model:
            module.weight = nn.Parameter(torch.zeros(2, 4))
    changes.take_back()
    assert model[0].weight is model[1].weight and model[0].weight.is_meta


def test_a_tensor_of_the_full_model_is_not_kept():
    model = nn.Linear(4, 8)
    with recorded(model) as changes:
        weight, model.weight = model.weight, nn.Parameter(torch.zeros(2, 4))
    (of_module,) = changes._of.values()
    assert of_module.dicts["_parameters"].before["weight"].is_meta
    assert weight.shape == (8, 4)
