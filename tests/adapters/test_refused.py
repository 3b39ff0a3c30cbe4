"""What cannot be trained is refused by name, before anything is changed."""

import pytest
import torch

from hf_sdp import SDPConfig, SDPConfigError, patch_model
from hf_sdp.model.state import find_state
from tests.support.models import tiny_model

peft = pytest.importorskip("peft")

OF_PEFT = {
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "trainable_token_indices": lambda: peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]),
}


def refused(model, match: str, **sdp) -> None:
    values = [p.clone() for p in model.parameters()]
    with pytest.raises(SDPConfigError, match=match):
        patch_model(model, SDPConfig(**sdp), rank=0, world_size=2)
    assert find_state(model) is None and all(map(torch.equal, values, model.parameters()))


@pytest.mark.parametrize("name", OF_PEFT)
def test_other_adapters(name):
    refused(peft.get_peft_model(tiny_model(), OF_PEFT[name]()), name)


def test_adapters_without_a_model_of_peft():
    model = tiny_model()
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    refused(model, "peft.get_peft_model")


def test_merged_adapters():
    model = tiny_model(lora={})
    model.merge_adapter()
    refused(model, "q_proj are merged.*unmerge_adapter")


def test_what_learns_and_is_not_saved():
    model = tiny_model(lora={})
    model.get_base_model().model.norm.weight.requires_grad_(True)
    refused(model, r"model.norm.weight.*modules_to_save")


def test_at_neuron_level_what_peft_has_put_in_place_of_what_is_cut():
    copied = dict(target_modules=["q_proj"], modules_to_save=["down_proj"])
    refused(tiny_model(lora=copied), r"down_proj.*modules_to_save.*level='block'")
    experts = tiny_model(task="causal", model_type="mixtral", lora={})
    refused(experts, r"experts.*ParamWrapper.*level='block'", coverage=0.5)
