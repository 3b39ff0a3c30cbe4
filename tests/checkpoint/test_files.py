"""What an error says of a file that cannot be read, or that is no file of ours."""

import contextlib
import json
import os

import pytest
import torch

from hf_sdp import SDPConfigError, SDPStateError
from hf_sdp.checkpoint.marker import MARKER, check, fingerprint
from hf_sdp.checkpoint.saved_optimizer import GROUPS, SavedByTorch, SavedOptimizer
from hf_sdp.checkpoint.weights import INDEX, SINGLE, Weights
from tests.support.models import tiny_model


@contextlib.contextmanager
def no_permission(path):
    """``path`` may not be read or searched: also as root, who becomes somebody else for that."""
    mode, user = path.stat().st_mode, os.geteuid()
    for parent in path.parents:
        if user == 0 and parent.stat().st_uid == 0 and parent.name.startswith("pytest-"):
            parent.chmod(0o755)
    path.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(mode)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint as far as its marker is concerned."""
    folder = tmp_path / "state"
    tiny_model().save_pretrained(folder)
    files = {SINGLE: fingerprint(folder / SINGLE)}
    rest = {"world_size": 2, "sdp_config": {}, "plan_hash": "", "versions": {}}
    (folder / MARKER).write_text(json.dumps({"files": files, **rest}))
    return folder


@pytest.mark.parametrize("what", [SINGLE, MARKER, ""], ids=["weights", "marker", "folder"])
def test_no_permission_is_not_missing(folder, what):
    with no_permission(folder / what):
        with pytest.raises(SDPConfigError, match="no permission to read"):
            check(folder, contents=True)
        if what != MARKER:
            with pytest.raises(SDPConfigError, match="no permission to read"):
                Weights(folder)
    assert check(folder, contents=True) and Weights(folder).files


def test_an_index_without_permission_is_not_missing(tmp_path):
    tiny_model().save_pretrained(tmp_path / "state", max_shard_size="20KB")
    with no_permission(tmp_path / "state" / INDEX), pytest.raises(SDPConfigError, match=f"{INDEX}.*no permission"):
        Weights(tmp_path / "state")


def test_a_dtype_that_is_not_known_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, tmp_path / SINGLE)
    with pytest.raises(SDPConfigError, match=f"{SINGLE}: a is of dtype F8_E4M3"):
        Weights(tmp_path).dtype("a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ([], "it is no dict"),
        ({"groups": {}}, "'groups' is missing, or no list"),
        ({"optimizer": None}, "'optimizer' is missing, or no str"),
        ({"groups": [3]}, "group 0 is no dict"),
        ({"groups": [{"params": "all"}]}, "'params' of group 0 is no list of names"),
        ({"groups": [{"params": [1]}]}, "'params' of group 0 is no list of names"),
        ({"groups": [{"params": [], "lr": {"value": 1, "dtype": "save"}}]}, "'lr' of group 0 is"),
        ({"numbers": []}, "'numbers' is missing, or no dict"),
        ({"numbers": {"a": 3}}, "the numbers of a are 3"),
        ({"numbers": {"a": {"step": {"value": "x", "dtype": "int64"}}}}, "'step' of a is"),
    ],
    ids=str,
)
def test_groups_of_wrong_types_are_named(tmp_path, content, message):
    rest = {"optimizer": "AdamW", "groups": [], "numbers": {}}
    text = content if isinstance(content, str) else json.dumps({**rest, **content} if content else content)
    (tmp_path / GROUPS).write_text(text)
    with pytest.raises(SDPStateError, match=f"{GROUPS}.*{message}"):
        SavedOptimizer(tmp_path, tiny_model())


@pytest.mark.parametrize("content", [{"state": {}}, [], {"state": [], "param_groups": [{"params": []}]}], ids=str)
def test_a_plain_optimizers_file_of_wrong_types_is_named(tmp_path, content):
    model = tiny_model()
    torch.save(content, tmp_path / "optimizer.pt")
    with pytest.raises(SDPStateError, match="optimizer.pt is cut short or not"):
        SavedByTorch(tmp_path / "optimizer.pt", torch.optim.SGD(model.parameters()), model)
