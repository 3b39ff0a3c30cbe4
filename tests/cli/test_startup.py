"""What the command imports before it needs it, and short helps that are known without."""

import json
import re
import subprocess
import sys

import pytest

from hf_sdp.cli import SHORT_HELPS, commands


@pytest.mark.parametrize("name", SHORT_HELPS)
def test_the_short_help_is_the_first_sentence_of_the_long_one(run, name):
    first = re.match(r".*?\.(?=\s|$)", commands.get_command(None, name).help, re.DOTALL)[0]
    assert SHORT_HELPS[name] == " ".join(first.split())
    shown = " ".join(run("--help")[1].split())
    assert f"{name} {SHORT_HELPS[name]}" in shown


def imported_by(program: str, *modules: str) -> set[str]:
    """Which of the modules a new process has imported after a program."""
    program += "\nimport json, sys\nprint(json.dumps([*sys.modules]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(modules) & set(json.loads(done.stderr.splitlines()[-1]))


HEAVY = ("torch", "transformers", "numpy", "networkx", "rich", "matplotlib", "datasets", "accelerate")


@pytest.mark.parametrize(
    "program",
    [
        "import hf_sdp, hf_sdp.cli, hf_sdp.cli.options",
        "from hf_sdp import SDPConfig, SDPConfigError, Workload",
        "from hf_sdp.cli import main; main(['--help'])",
    ],
)
def test_what_needs_no_model_imports_nothing_heavy(program):
    assert imported_by(program, "hf_sdp", *HEAVY) == {"hf_sdp"}


def test_a_plan_without_picture_imports_no_tool_of_another_room():
    """accelerate and scipy are not among them: transformers imports them."""
    rooms = ("hf_sdp.bench", "hf_sdp.hosts", "hf_sdp.engine", "hf_sdp.checkpoint")
    tools = ("matplotlib", "datasets", "pandas", "sklearn", "torchvision")
    program = "from hf_sdp.cli import main; main(['plan', 'llama-134m', '--json'])"
    assert imported_by(program, "torch", *rooms, *tools) == {"torch"}
