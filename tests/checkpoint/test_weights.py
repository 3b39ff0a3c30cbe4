"""Weights written tensor by tensor are files that safetensors and transformers read."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_sdp import SDPConfigError
from hf_sdp.checkpoint.weights import INDEX, SINGLE, Weights, WeightsWriter
from hf_sdp.plan.region import Region
from tests.support.models import tiny_model

TENSORS = {
    "a": torch.randn(7, 3),
    "b": torch.randn(5).bfloat16(),
    "scalar": torch.tensor(3),
    "flags": torch.tensor([[True], [False]]),
    "column": torch.randn(4, 6)[:, ::2],  # not contiguous
}


def write(folder, tensors=TENSORS, order=list, **options):
    writer = WeightsWriter(folder, {n: (tuple(t.shape), t.dtype) for n, t in tensors.items()}, **options)
    for name in order(tensors):
        writer.write(name, tensors[name])
    writer.finish()


def read(weights: Weights, region: Region) -> torch.Tensor:
    values = torch.empty(region.shape, dtype=weights.dtype(region.name))
    weights.read(region, values)
    return values


@pytest.mark.parametrize("order", [list, reversed])
def test_the_file_is_what_safetensors_reads(tmp_path, order):
    write(tmp_path, order=order)
    loaded = load_file(tmp_path / SINGLE)
    assert loaded.keys() == TENSORS.keys()
    assert all(torch.equal(loaded[n], t) and loaded[n].dtype == t.dtype for n, t in TENSORS.items())
    weights = Weights(tmp_path)
    assert torch.equal(read(weights, Region("a", (((2, 5),), ((1, 3),)))), TENSORS["a"][2:5, 1:3])
    assert weights.shape("b") == (5,) and weights.dtype("b") == torch.bfloat16 and weights.shape("none") is None


def test_shards_and_their_index_replace_a_single_file_and_the_other_way_round(tmp_path):
    model = tiny_model()
    tensors = {n: p.detach() for n, p in model.named_parameters()}
    model.save_pretrained(tmp_path)
    write(tmp_path, tensors, max_shard_size="50KB")
    assert not (tmp_path / SINGLE).exists() and len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(p, tensors[n]) for n, p in loaded.named_parameters())
    write(tmp_path, tensors)
    assert [p.name for p in tmp_path.glob("model*")] == [SINGLE] and not (tmp_path / INDEX).exists()
    assert not list(tmp_path.glob(".*"))


def test_a_large_tensor_between_small_ones_gets_a_file_of_its_own(tmp_path):
    tensors = {"a": torch.randn(10), "large": torch.randn(1000), "b": torch.randn(10)}
    write(tmp_path, tensors, max_shard_size=400)
    weights = Weights(tmp_path)
    assert len({weights.files[n].name for n in tensors}) == 2
    assert all(torch.equal(read(weights, Region.whole(n, tuple(t.shape))), t) for n, t in tensors.items())


def test_what_was_there_stays_when_writing_fails(tmp_path, monkeypatch):
    write(tmp_path)
    before = (tmp_path / SINGLE).read_bytes()
    writer = WeightsWriter(tmp_path, {"a": ((2,), torch.float32)})
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    writer.write("a", torch.zeros(2))
    with pytest.raises(OSError, match="No space"):
        writer.finish()
    assert (tmp_path / SINGLE).read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [SINGLE]


def test_files_that_are_cut_short_or_not_there_are_named(tmp_path):
    with pytest.raises(SDPConfigError, match="neither model.safetensors nor"):
        Weights(tmp_path)
    write(tmp_path)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:-5])
    with pytest.raises(SDPConfigError, match="model.safetensors is missing, cut short"):
        Weights(tmp_path)
