"""The page on families: its model is registered as it says, and then works at both levels."""

import re
from pathlib import Path

import pytest
import torch

import hf_sdp
from hf_sdp import Family, SDPConfig, SDPConfigError, make_plan, patch_model
from hf_sdp.families import registered
from hf_sdp.model.state import get_state

PAGE = Path(hf_sdp.__file__).parent / "FAMILIES.md"


@pytest.fixture
def page(monkeypatch):
    """What the page defines: its model, and then what registers it."""
    monkeypatch.setattr(registered, "_FAMILIES", {})
    model, registration = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    defined: dict = {}
    exec(compile(model, "FAMILIES.md", "exec"), defined)
    return defined, lambda: exec(compile(registration, "FAMILIES.md", "exec"), defined)


@pytest.mark.parametrize(
    "options", [dict(level="block", coverage=0.5), dict(coverage=0.5), dict(coverage=0.75)], ids=str
)
def test_the_model_of_the_page_learns_what_the_dense_one_does(page, options):
    defined, register = page
    config = defined["ToyConfig"]()
    config.architectures = ["ToyModel"]

    def make():
        torch.manual_seed(0)
        return defined["ToyModel"](config)

    with pytest.raises(SDPConfigError, match="register_family"):
        make_plan(make(), SDPConfig(**options), 4)
    register()
    plan = make_plan(make(), SDPConfig(**options), 4)
    assert {module.kind for module in plan.modules} == {"mlp"} and len(plan.modules) == 4
    tokens = torch.arange(8).view(1, 8)
    dense = make()
    with torch.no_grad():
        for name, slices in plan.slices.items():
            for s in slices:
                if 1 not in s.holders:
                    dense.get_parameter(name).narrow(s.dim, s.start, s.stop - s.start).zero_()
    dense(tokens=tokens).square().mean().backward()
    model = patch_model(make(), SDPConfig(**options), rank=1, world_size=4)
    model(tokens=tokens).square().mean().backward()
    for local_name, p in model.named_parameters():
        region = get_state(model).held.subnetwork.tensors[local_name].region
        torch.testing.assert_close(p.grad, region.of(dense.get_parameter(region.name).grad), rtol=1e-4, atol=1e-6)


def test_what_is_said_must_be_said_well(monkeypatch, page):
    defined, register = page
    register()
    register_family = hf_sdp.register_family
    with pytest.raises(SDPConfigError, match="Something else has been registered"):
        register_family("toy", Family(layers=("other",)))
    with pytest.raises(SDPConfigError, match="tuple of names, got the text 'tower'"):
        register_family("tower", Family(layers="tower"))
    with pytest.raises(SDPConfigError, match="got dict"):
        register_family("tower", {"layers": ()})
    monkeypatch.setattr(registered, "_FAMILIES", {"toy": Family(layers=("nowhere",))})
    with pytest.raises(SDPConfigError, match="register_family|no module 'nowhere'"):
        make_plan(defined["ToyModel"](defined["ToyConfig"]()), SDPConfig(), 2)


def test_what_is_said_to_be_held_by_all_is_never_left_out(monkeypatch):
    from tests.support.models import tiny_config

    monkeypatch.setattr(registered, "_FAMILIES", {"llama": Family(held_by_all=(r"layers\.0\.mlp",))})
    plan = make_plan(tiny_config(), SDPConfig(level="block"), 2)
    names = {module.name for module in plan.modules}
    assert "model.layers.0.mlp" not in names and {"model.layers.0.self_attn", "model.layers.1.mlp"} <= names
