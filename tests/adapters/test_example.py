"""examples/finetune_lora.py, launched as users do it."""

import re
from pydoc_data.topics import topics

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from hf_sdp.bench import corpus
from tests.support.examples import EXAMPLES, launch, tiny_base
from tests.support.models import tiny_model

peft = pytest.importorskip("peft")


@pytest.mark.long
@pytest.mark.parametrize("options", [["--sdp_level", "neuron"]])
def test_the_loss_that_is_printed_is_that_of_the_adapters_in_peft(tmp_path, options):
    base, text = tiny_base(tmp_path / "base"), tmp_path / "text.txt"
    text.write_text("\n".join(topics.values())[:200_000])
    options = [*options, "--model_name_or_path", base, "--text_file", text, "--output_dir", tmp_path / "out"]
    options += ["--max_steps", 5, "--block_length", 32]
    said = launch(EXAMPLES / "finetune_lora.py", *options, folder=tmp_path)
    before, after = map(float, re.search(r"before ([\d.]+), after ([\d.]+)", said).groups())
    rows = corpus.blocks(corpus.text_lines(text), PreTrainedTokenizerFast.from_pretrained(base), 32)["valid"]
    model = peft.PeftModel.from_pretrained(tiny_model(vocab_size=300), tmp_path / "out").eval()
    ids = torch.tensor(rows["input_ids"][:64])
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(after, abs=1e-3)
        with model.disable_adapter():
            assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(before, abs=1e-3)
    assert after < before
