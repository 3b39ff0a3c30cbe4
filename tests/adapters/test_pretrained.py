"""Adapters around a base that no worker ever has in full."""

import pytest
import torch

import hf_sdp
from hf_sdp import SDPAccelerator, SDPConfig, SDPConfigError, consolidate
from tests.support.models import batch, tiny_model
from tests.support.training import EVERYTHING
from tests.support.workers import run_workers

peft = pytest.importorskip("peft")

LORA = dict(r=4, lora_alpha=8, target_modules="all-linear", modules_to_save=["embed_tokens"])


def load(base, folder, sdp: dict):
    accelerator = SDPAccelerator()
    model = hf_sdp.from_pretrained(base, SDPConfig(**sdp), peft_config=peft.LoraConfig(**LORA), seed=1)
    start = consolidate(model)
    model.train()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    accelerator.backward(model(**batch(accelerator.process_index)).loss)
    optimizer.step()
    model.save_pretrained(folder)
    with torch.no_grad():
        loss = model.eval()(**batch(9)).loss.item()
    return start, loss


@pytest.mark.parametrize(
    "sdp", [dict(coverage=0.75), pytest.param(dict(level="block"), marks=pytest.mark.long)], ids=str
)
def test_a_base_is_read_slice_by_slice_and_adapters_are_the_same_in_every_world(tmp_path, sdp):
    base = tiny_model(**EVERYTHING)
    base.save_pretrained(tmp_path / "base")
    (start, loss), *_ = run_workers(load, tmp_path / "base", tmp_path / "adapters", sdp)
    alone = hf_sdp.from_pretrained(
        tmp_path / "base", SDPConfig(level="block", coverage=1.0), peft_config=peft.LoraConfig(**LORA), seed=1, rank=0,
        world_size=2,
    )  # fmt: skip
    dense = peft.get_peft_model(tiny_model(**EVERYTHING), peft.LoraConfig(**LORA))
    assert start.keys() == dense.state_dict().keys()
    random = 0
    for name, value in dense.state_dict().items():
        torch.testing.assert_close(start[name], alone.state_dict()[name], rtol=0, atol=0)
        if "lora_A" in name:
            assert 0.8 < start[name].std() / value.std() < 1.2 and not torch.equal(start[name], value)
            random += 1
        else:
            torch.testing.assert_close(start[name], value, rtol=0, atol=0)
    assert random
    reloaded = peft.PeftModel.from_pretrained(tiny_model(**EVERYTHING), tmp_path / "adapters").eval()
    with torch.no_grad():
        assert reloaded(**batch(9)).loss.item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("options", [dict(use_dora=True), dict(init_lora_weights="pissa")], ids=str)
def test_adapters_that_begin_with_values_of_the_base_are_refused(tmp_path, options):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(SDPConfigError, match="begin with values of the base"):
        config = peft.LoraConfig(target_modules=["q_proj"], **options)
        hf_sdp.from_pretrained(tmp_path, SDPConfig(), peft_config=config, rank=0, world_size=2)
