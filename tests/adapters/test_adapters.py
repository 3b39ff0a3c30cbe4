"""What users of PEFT do with adapters: several of them, switched on and off, merged, with other modules that learn."""

import pytest
import torch

from hf_sdp import SDPAccelerator, SDPConfig, SDPStateError, consolidate, patch_model
from hf_sdp.model.state import get_state, unwrap
from tests.support.models import batch, tiny_model, with_adapters
from tests.support.training import EVERYTHING
from tests.support.workers import run_workers

pytest.importorskip("peft")

OTHER = dict(r=2, target_modules=["q_proj", "down_proj"])


def with_two_adapters(**options):
    from peft import LoraConfig

    model = tiny_model(lora={})
    model.add_adapter("other", LoraConfig(**OTHER, **options))
    model.set_adapter("other")
    return model


def train_the_other(folder, sdp: dict):
    """Changed parameters, losses of the full model with each adapter and without, and of what is saved and merged."""
    from peft import PeftModel

    model = with_two_adapters(init_lora_weights=False)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    accelerator = SDPAccelerator()
    model = patch_model(model, SDPConfig(**sdp))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    for step in range(2):
        accelerator.backward(model(**batch(accelerator.process_index + 4 * step)).loss)
        optimizer.step()
        optimizer.zero_grad()
    weights = consolidate(model)
    model.save_pretrained(folder)
    losses = losses_of_adapters(model)
    model.train()
    model.set_adapter("default")
    with pytest.raises(SDPStateError, match="unfrozen after the model was prepared"):
        model(**batch(0))
    if weights is None:
        return
    changed = {name for name, value in weights.items() if not torch.equal(value, start[name])}
    reloaded = PeftModel.from_pretrained(tiny_model(), folder)
    reloaded.load_adapter(folder / "other", "other")
    dense = with_two_adapters()
    dense.load_state_dict(weights)
    assert losses_of_adapters(reloaded) == losses_of_adapters(dense) == pytest.approx(losses, abs=1e-6)
    merged = dense.merge_and_unload(adapter_names=["other"])
    with torch.no_grad():
        assert merged(**batch(9)).loss.item() == pytest.approx(losses[0], abs=1e-5)
    return changed


@torch.no_grad()
def losses_of_adapters(model) -> list[float]:
    model.eval()
    found = []
    for adapter in ("other", "default"):
        model.set_adapter(adapter)
        found.append(model(**batch(9)).loss.item())
    with model.disable_adapter():
        found.append(model(**batch(9)).loss.item())
    model.set_adapter("other")
    return found


@pytest.mark.parametrize(
    "sdp", [dict(coverage=0.75), pytest.param(dict(level="block"), marks=pytest.mark.long)], ids=str
)
def test_of_several_adapters_one_learns_and_all_are_saved(tmp_path, sdp):
    """Of four workers at coverage 0.75 some hold modules in several parts."""
    changed = run_workers(train_the_other, tmp_path, sdp, world_size=4)[0]
    assert changed == {name for name, p in with_two_adapters().named_parameters() if p.requires_grad}


def train_few(lora: dict, model: dict, sdp: dict | None):
    accelerator = SDPAccelerator()
    net = tiny_model(**model, lora=lora)
    if sdp is None:  # plain FSDP2
        from hf_sdp.engine.fsdp import fully_shard_plainly

        fully_shard_plainly(net.get_base_model(), "cpu", reshard_after_forward=True)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    else:
        net = patch_model(net, SDPConfig(**sdp))
        net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.5))
    losses = []
    for step in range(3):
        loss = net(**batch(accelerator.process_index + 2 * step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("level", ["block", pytest.param("neuron", marks=pytest.mark.long)])
def test_with_everything_held_it_is_plain_fsdp2(level):
    plain = run_workers(train_few, {}, EVERYTHING, None, world_size=2)
    assert run_workers(train_few, {}, EVERYTHING, dict(level=level, coverage=1.0), world_size=2) == plain


def adapters_after_patching(sdp: dict):
    model = with_adapters(patch_model(tiny_model(), SDPConfig(**sdp)))
    if sdp.get("simulate"):
        return model(**batch(0))
    SDPAccelerator().prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))


@pytest.mark.parametrize("sdp", [dict(level="block"), dict(), dict(level="block", simulate=2)], ids=str)
def test_adapters_come_before_patching(sdp):
    with pytest.raises(AssertionError, match=r"Change it before patching \(get_peft_model too\)"):
        run_workers(adapters_after_patching, sdp, world_size=1 if sdp.get("simulate") else 2)


def test_every_module_that_is_gathered_by_its_call_is_called_with_adapters_off():
    """FSDP2 gathers a group when its first module is called, and takes its forward to end with the last one."""
    model = patch_model(tiny_model(**EVERYTHING, lora={}), SDPConfig(coverage=0.75), rank=0, world_size=4)
    groups = get_state(model).held.groups
    parts = [name for group in groups for name in group.modules if ".parts." in name]
    called = set()
    for name in parts:
        unwrap(model).get_submodule(name).register_forward_hook(lambda *args, name=name: called.add(name))
    with model.disable_adapter():
        model(**batch(0))
    assert parts and called == set(parts)
    assert any("lora_B" in name for group in groups for name in group.tensors if group.modules[0] in parts)
