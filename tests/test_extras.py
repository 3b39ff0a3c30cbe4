"""Without the extra ``bench`` the core works, and a command that needs it says so in one line."""

import importlib
import importlib.util
import pkgutil
import subprocess
import sys

import pytest

import hf_sdp
from hf_sdp.cli import main

BENCH = ("matplotlib", "datasets", "tokenizers")
DRAWS = {"hf_sdp.bench.picture", "hf_sdp.bench.quality.plots", "hf_sdp.bench.quality.report"}


@pytest.mark.parametrize(
    "arguments",
    [["compare"], ["simulate", "--output", "out"], ["plan", "llama-134m", "--picture", "plan.png"]],
    ids=lambda arguments: arguments[0],
)
def test_a_command_names_the_extra_that_it_needs(arguments, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in BENCH else find(name))
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    assert refused.value.code == 2
    name = "plan --picture" if arguments[0] == "plan" else arguments[0]
    assert capsys.readouterr().err == f'hf-sdp: {name} needs matplotlib: pip install "hf_sdp[bench]"\n'


def test_only_what_draws_imports_the_extra():
    modules = [module.name for module in pkgutil.walk_packages(hf_sdp.__path__, "hf_sdp.")]
    wanted = [name for name in modules if name not in DRAWS and not name.endswith("__main__")]
    blocked = "import importlib, sys; sys.modules.update(matplotlib=None, datasets=None)\n"
    script = blocked + f"for name in {wanted!r}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
