"""What a checkpoint says is read, never run, and names no file outside of it."""

import enum
import json
import pickle
import shutil

import pytest
import torch
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from hf_sdp import SDPConfigError, SDPStateError
from hf_sdp.checkpoint import tensors as boxes
from hf_sdp.checkpoint.marker import MARKER, check
from hf_sdp.checkpoint.metadata import FILE, read_metadata
from hf_sdp.checkpoint.weights import INDEX, Weights
from hf_sdp.plan.region import Region
from tests.support.models import tiny_model


class Command:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str):
        self.command = command

    def __reduce__(self):
        import os

        return os.system, (self.command,)


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)


@pytest.fixture
def folder(tmp_path):
    """As torch.distributed.checkpoint writes it."""
    written = {}
    for dtype in DTYPES:
        written[str(dtype)] = boxes.Boxes((4, 3), dtype)
        written[str(dtype)].add(Region.whole("x", (4, 3)), torch.ones(4, 3, dtype=dtype))
    boxes.write(tmp_path / "tensors", written, None)
    return tmp_path / "tensors"


def read_all(folder) -> dict[str, torch.Tensor]:
    values, targets = {}, {}
    for name, (shape, dtype) in boxes.stored(folder).items():
        values[name], targets[name] = torch.zeros(shape, dtype=dtype), boxes.Boxes(shape, dtype)
        targets[name].add(Region.whole(name, shape), values[name])
    boxes.read(folder, targets, None)
    return values


def test_what_torch_writes_is_read(folder):
    values = read_all(folder)
    assert {name: v.dtype for name, v in values.items()} == {str(dtype): dtype for dtype in DTYPES}
    assert all((v == 1).all() for v in values.values())


class OfPython311(pickle.Pickler):
    """Members of enumerations by ``getattr``, as Python 3.11.0 to 3.11.3 write them."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_what_the_first_versions_of_python_3_11_write_is_read(folder):
    metadata = read_metadata(folder)
    with open(folder / FILE, "wb") as file:
        OfPython311(file).dump(metadata)
    assert b"getattr" in (folder / FILE).read_bytes()
    assert read_metadata(folder) == metadata
    assert all((v == 1).all() for v in read_all(folder).values())


class Attribute:
    """An attribute of something when it is unpickled."""

    def __init__(self, *names):
        self.names = names

    def __reduce__(self):
        return getattr, self.names


@pytest.mark.parametrize(
    "names",
    [(_MEM_FORMAT_ENCODING, "__init__"), (Metadata, "__reduce__"), (Metadata.__init__, "__globals__")],
    ids=["init", "reduce", "globals"],
)
def test_getattr_gives_members_of_one_enumeration_only(folder, names):
    (folder / FILE).write_bytes(pickle.dumps(Attribute(*names)))
    with pytest.raises(SDPStateError, match="it asks for|it names"):
        read_metadata(folder)


@pytest.mark.parametrize("read", [boxes.stored, read_metadata, read_all])
def test_a_command_in_the_metadata_is_not_run(folder, tmp_path, read):
    run = tmp_path / "it_was_run"
    (folder / FILE).write_bytes(pickle.dumps(Command(f"touch {run}")))
    pickle.loads((folder / FILE).read_bytes())  # the command is a real one
    assert run.is_file()
    run.unlink()
    with pytest.raises(SDPStateError, match="it names (posix|nt).system"):
        read(folder)
    assert not run.exists()


@pytest.mark.parametrize("hidden", ["state_dict_metadata", "planner_data", "storage_data"])
def test_a_command_within_true_metadata_is_not_run(folder, tmp_path, hidden):
    run, metadata = tmp_path / "it_was_run", read_metadata(folder)
    content = dict(getattr(metadata, hidden) or {})
    content["harmless"] = Command(f"touch {run}")
    setattr(metadata, hidden, content)
    (folder / FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(SDPStateError, match="it names"):
        boxes.stored(folder)
    assert not run.exists()


@pytest.mark.parametrize("path", ["../elsewhere", "/etc/hostname", "", ".."])
def test_metadata_names_no_file_elsewhere(folder, path):
    metadata = read_metadata(folder)
    for info in metadata.storage_data.values():
        object.__setattr__(info, "relative_path", path)
    (folder / FILE).write_bytes(pickle.dumps(metadata))
    with pytest.raises(SDPStateError, match="which is no file of the folder"):
        boxes.stored(folder)


def test_what_is_no_metadata_is_named(folder):
    for content in (pickle.dumps({"storage_data": {}}), b"", b"no pickle"):
        (folder / FILE).write_bytes(content)
        with pytest.raises(SDPStateError, match=FILE):
            boxes.stored(folder)
    (folder / FILE).unlink()
    with pytest.raises(SDPStateError, match=f"{FILE} cannot be read.*No such file"):
        boxes.stored(folder)


@pytest.mark.parametrize("path", ["../model.safetensors", "/model.safetensors"])
def test_an_index_of_weights_names_no_file_elsewhere(tmp_path, path):
    tiny_model().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    index = tmp_path / "model" / INDEX
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = path
    index.write_text(json.dumps(content))
    with pytest.raises(SDPConfigError, match="which is no file of the folder"):
        Weights(tmp_path / "model")
    for broken in ([], {"weight_map": []}, {"weight_map": None}):
        index.write_text(json.dumps(broken))
        with pytest.raises(SDPConfigError, match=f"{INDEX} cannot be read"):
            Weights(tmp_path / "model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "'files' is missing"),
        ({"files": []}, "'files' is missing, or no dict"),
        ({"files": {"../model.safetensors": {"bytes": 1, "crc32": "0"}}}, "which is no file of the folder"),
        ({"files": {"/etc/hostname": {"bytes": 1, "crc32": "0"}}}, "which is no file of the folder"),
        ({"files": {"model.safetensors": 3}}, "'model.safetensors' has no size"),
        ({"files": {"model.safetensors": {"bytes": "3"}}}, "'model.safetensors' has no size"),
        ({"files": {}, "world_size": "2"}, "'world_size' is missing, or no int"),
    ],
    ids=str,
)
def test_a_marker_of_wrong_types_is_named(tmp_path, content, message):
    rest = {"world_size": 2, "sdp_config": {}, "plan_hash": "", "versions": {}}
    (tmp_path / MARKER).write_text(json.dumps({**rest, **content} if isinstance(content, dict) else content))
    with pytest.raises(SDPStateError, match=f"{MARKER} .*{message}"):
        check(tmp_path)
    shutil.rmtree(tmp_path)
