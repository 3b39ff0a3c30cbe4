"""The wheel has every module and page of the checkout, and says what it needs. tests/wheel.sh installs and uses it."""

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import hf_sdp

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """Built from a copy: setuptools would leave a build folder in the checkout, and take files from an old one."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "hf_sdp", source / "hf_sdp", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", built, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(next(built.glob("hf_sdp-*.whl")))


@pytest.fixture(scope="module")
def metadata(wheel) -> email.message.Message:
    return email.message_from_bytes(_dist_info(wheel, "METADATA"))


def test_it_has_all_modules_and_pages(wheel):
    files = [path for path in (ROOT / "hf_sdp").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    checkout = {str(path.relative_to(ROOT)) for path in files}
    assert {"hf_sdp/py.typed", "hf_sdp/estimate/PLAN.md", "hf_sdp/cli/__init__.py"} <= checkout
    assert {name for name in wheel.namelist() if name.startswith("hf_sdp/")} == checkout


def test_the_version_is_that_of_the_package(metadata):
    assert metadata["Version"] == hf_sdp.__version__


def test_the_core_needs_none_of_the_extras_libraries(metadata):
    needed = metadata.get_all("Requires-Dist")
    core = {line.split(">")[0] for line in needed if "extra ==" not in line}
    assert {"torch", "transformers", "accelerate"} <= core
    assert core.isdisjoint({"matplotlib", "datasets", "tokenizers", "pytest", "mypy"})
    assert any(line.startswith("matplotlib") and 'extra == "bench"' in line for line in needed)


def test_the_command_is_installed(wheel):
    assert b"hf-sdp = hf_sdp.cli:main" in _dist_info(wheel, "entry_points.txt")


def _dist_info(wheel: zipfile.ZipFile, name: str) -> bytes:
    return wheel.read(f"hf_sdp-{hf_sdp.__version__}.dist-info/{name}")
