"""Checkpoint folders without processes: what is renamed when, and what is found damaged."""

import json
import os

import pytest

from hf_sdp import SDPStateError
from hf_sdp.checkpoint.folder import _place_of, _take_place, finish_interrupted, give_up
from hf_sdp.checkpoint.marker import MARKER, check, fingerprint


def sealed(folder, content: str):
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(content)
    files = {"model.safetensors": fingerprint(folder / "model.safetensors")}
    rest = {"world_size": 2, "sdp_config": {}, "plan_hash": "", "versions": {}}
    (folder / MARKER).write_text(json.dumps({"files": files, **rest}))
    return folder


@pytest.mark.parametrize("afterwards", [finish_interrupted, give_up])
def test_what_else_is_in_the_folder_survives_a_failure_at_any_renaming(tmp_path, monkeypatch, afterwards):
    """Two renames of folders and one of a file of the user's: each of them fails once."""
    rename = os.rename
    for failing in range(3):
        folder = sealed(tmp_path / str(failing) / "state", "old")
        (folder / "notes.txt").write_text("mine")
        sealed(_place_of(folder), "new")
        calls = []

        def fail_once(a, b, failing=failing, calls=calls):
            calls.append(a)
            if len(calls) == failing + 1:
                raise OSError(5, "Input/output error")
            rename(a, b)

        monkeypatch.setattr("hf_sdp.checkpoint.folder.os.rename", fail_once)
        with pytest.raises(OSError, match="Input/output"):
            _take_place(_place_of(folder), folder)
        monkeypatch.setattr("hf_sdp.checkpoint.folder.os.rename", rename)
        afterwards(folder)
        expected = "new" if afterwards is finish_interrupted or failing == 2 else "old"
        assert check(folder) and (folder / "model.safetensors").read_text() == expected
        assert (folder / "notes.txt").read_text() == "mine"
        assert [p.name for p in folder.parent.iterdir()] == ["state"]


def test_a_replaced_folder_comes_back_when_the_new_one_is_not_complete(tmp_path):
    folder = tmp_path / "state"
    sealed(_place_of(folder).parent / "replaced", "old")
    finish_interrupted(folder)
    assert check(folder) and (folder / "model.safetensors").read_text() == "old"


def test_changed_contents_are_found_by_their_checksum(tmp_path):
    folder = sealed(tmp_path / "state", "old")
    assert check(folder, contents=True)
    (folder / "model.safetensors").write_text("odd")  # of the same size
    assert check(folder)
    with pytest.raises(SDPStateError, match="the content of model.safetensors has changed"):
        check(folder, contents=True)
