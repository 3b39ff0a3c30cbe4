"""The scripts of examples/, imported, and launched as users do it."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

from hf_sdp.bench import corpus
from tests.support.models import tiny_model

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def load(name: str):
    """A module of examples/. It may import the others by their names, as it does when it is run."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    return importlib.import_module(name)


def launch(*command: object, folder: Path, timeout_s: float = 250) -> str:
    """What two CPU workers print that do ``command``: a script of examples/, or ``-m`` and a module, with its options.

    ``folder`` is their working directory, and keeps what datasets caches.
    """
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    launcher += ["--config_file", ROOT / "configs" / "accelerate" / "cpu_2.yaml"]
    return run(*launcher, *command, folder=folder, timeout_s=timeout_s)


def run(*command: object, folder: Path, timeout_s: float = 250, **variables: str) -> str:
    """What ``command`` prints in this working directory. ``variables``: of the environment."""
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment | variables,
        cwd=folder,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tiny_base(folder: Path) -> Path:
    """``folder`` with a tiny Llama and a tokenizer of as many tokens."""
    tiny_model(vocab_size=300).save_pretrained(folder)
    corpus.train_tokenizer({"text": list(topics.values())[:20]}, 300).save_pretrained(folder)
    return folder
