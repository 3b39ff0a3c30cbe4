"""examples/finetune_lora.py, launched as users do it."""

import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_sdp.bench import corpus
from tests.support.models import tiny_model

peft = pytest.importorskip("peft")

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "accelerate" / "cpu_2.yaml"


@pytest.fixture
def base(tmp_path) -> Path:
    """A tiny model with a tokenizer of as many tokens."""
    from datasets import Dataset

    text = Dataset.from_dict({"name": list(topics)[:20], "text": list(topics.values())[:20]})
    tiny_model(vocab_size=300).save_pretrained(tmp_path / "base")
    corpus.train_tokenizer(text, 300).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.long
@pytest.mark.parametrize("options", [["--sdp_level", "neuron"], ["--dense"]])
def test_the_loss_that_is_printed_is_that_of_the_adapters_in_peft(base, tmp_path, options):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(topics.values())[:200_000])
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", CONFIG]
    command += [ROOT / "examples" / "finetune_lora.py", "--model_name_or_path", base, "--text_file", text]
    command += ["--output_dir", tmp_path / "out", "--max_steps", "5", "--block_length", "32", *options]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    before, after = map(float, re.search(r"before ([\d.]+), after ([\d.]+)", done.stdout).groups())
    rows = corpus.blocks(corpus.text_lines(text), PreTrainedTokenizerFast.from_pretrained(base), 32)["valid"]
    model = peft.PeftModel.from_pretrained(tiny_model(vocab_size=300), tmp_path / "out").eval()
    ids = torch.tensor(rows["input_ids"][:64])
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(after, abs=1e-3)
        with model.disable_adapter():
            assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(before, abs=1e-3)
    assert after < before
