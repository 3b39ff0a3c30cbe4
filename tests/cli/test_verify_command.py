"""``hf-sdp verify``: which faults of a checkpoint it finds."""

import json
import shutil

import pytest
import torch

from hf_sdp import SDPAccelerator, SDPConfig, patch_model
from hf_sdp.checkpoint.marker import MARKER, PLAN, fingerprint
from tests.support.cli import refused
from tests.support.models import batch, tiny_model
from tests.support.workers import run_workers


def save_checkpoint(folder):
    accelerator = SDPAccelerator()
    model = patch_model(tiny_model(), SDPConfig(coverage=0.5))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(**batch(accelerator.process_index)).loss)
    optimizer.step()
    accelerator.save_state(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "state"
    run_workers(save_checkpoint, folder, world_size=2)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "state")


def test_a_checkpoint_without_fault(run, saved):
    code, out, err = run("verify", saved)
    assert (code, err) == (0, "")
    for text in (
        "no fault found",
        "2 workers",
        "sizes and CRC-32 as written",
        "LlamaForCausalLM",
        "2 subnetworks",
        "exp_avg",
    ):
        assert text in out
    code, out, _ = run("verify", saved, "--no-contents")
    assert code == 0 and "contents not compared" in out


def test_a_standard_folder_is_checked_as_far_as_it_can_be(run, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    code, out, _ = run("verify", tmp_path)
    assert code == 0 and "not hf_sdp" in out and "in the shapes of config.json" in out
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    refused(run("verify", tmp_path), f"{first.name} is missing, cut short")
    first.unlink()
    refused(run("verify", tmp_path), f"{first.name} is missing")
    first.write_bytes(content)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused(run("verify", tmp_path), "model.safetensors.index.json cannot be read")


def sealed_again(folder, file: str, edit):
    """Change a file and its entry in the marker: a folder that fits its hashes, and not itself."""
    (folder / file).write_text(edit((folder / file).read_text()))
    marker = json.loads((folder / MARKER).read_text())
    if file != MARKER:
        marker["files"][file] = fingerprint(folder / file)
        (folder / MARKER).write_text(json.dumps(marker))


def edited(change):
    def edit(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return edit


def test_damaged_files_are_named(run, checkpoint):
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    refused(run("verify", checkpoint), "damaged: the content of model.safetensors has changed")
    assert run("verify", checkpoint, "--no-contents")[0] == 0
    weights.write_bytes(content[:-1])
    refused(run("verify", checkpoint, "--no-contents"), "damaged: model.safetensors has .* bytes")
    weights.unlink()
    refused(run("verify", checkpoint), "incomplete: model.safetensors is missing")
    (checkpoint / MARKER).unlink()
    refused(run("verify", checkpoint), f"incomplete: it has no {MARKER}")


def _in_the_second_of_two_phases(marker: dict, **options) -> None:
    second = {"start": 0.5, "coverage": 0.5, **options}
    marker["sdp_config"].update(coverage_schedule=[{"start": 0.0, "coverage": 0.5}, second])
    marker.update(phase=1)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (PLAN, lambda c: c.update(level="block"), f"{PLAN}: plan_hash is .* {MARKER} says"),
        (PLAN, lambda c: c.pop("shapes"), f"{PLAN} cannot be read as a plan: KeyError"),
        *(
            (PLAN, lambda c, wrong=wrong: c.update(wrong), f"{PLAN}(:| cannot be read as a plan:)")
            for wrong in (dict(shapes=[]), dict(modules={"a": 1}), dict(modules=[3]), dict(holder_sets=3))
        ),
        (
            "config.json",
            lambda c: c.update(intermediate_size=128),
            r"gate_proj.weight has shape \(64, 32\), the model needs",
        ),
        ("config.json", lambda c: c.update(num_hidden_layers=3), f"{PLAN}: model.layers.3.* has None"),
        ("config.json", lambda c: c.update(num_hidden_layers=5), "model.layers.4.* is missing, the model needs"),
        ("config.json", lambda c: c.update(hidden_size=-32), "No model can be made of the config of"),
        (MARKER, lambda c: c["sdp_config"].update(level="block"), "level is neuron.*says block"),
        (MARKER, lambda c: c["sdp_config"].update(level="layer"), f"{MARKER} is damaged: .*level must be one of"),
        (MARKER, lambda c: _in_the_second_of_two_phases(c, masking="backward"), "masking is forward.*says backward"),
        (MARKER, lambda c: _in_the_second_of_two_phases(c, level="block"), "level is neuron.*says block"),
        (MARKER, lambda c: c.update(phase=1), f"{MARKER} is damaged: IndexError"),
        (MARKER, lambda c: c.update(world_size=4), "num_subnetworks is 2.*says 4"),
        (MARKER, lambda c: c.pop("versions"), f"{MARKER} is damaged: 'versions' is missing"),
        (MARKER, lambda c: c.update(files=[]), f"{MARKER} is damaged"),
    ],
)
def test_what_does_not_fit_together_is_named(run, checkpoint, file, change, message):
    sealed_again(checkpoint, file, edited(change))
    refused(run("verify", checkpoint), message)


def test_a_damaged_index_of_the_optimizer_is_named(run, checkpoint):
    metadata = checkpoint / "sdp_optimizer" / "tensors" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-20])
    refused(run("verify", checkpoint), r"damaged: sdp_optimizer/tensors/.metadata has")
    marker = json.loads((checkpoint / MARKER).read_text())
    marker["files"]["sdp_optimizer/tensors/.metadata"] = fingerprint(metadata)
    (checkpoint / MARKER).write_text(json.dumps(marker))
    refused(run("verify", checkpoint), r"sdp_optimizer/tensors/.metadata cannot be read")
