"""The scripts of examples/, each launched as its users do it, on two workers at a tiny size.

Elsewhere: train_image_classifier.py and digits.py in tests/hosts/test_image_example.py, finetune_lora.py in
tests/adapters/test_example.py.
"""

import json
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support.examples import EXAMPLES, ROOT, launch, load, run, tiny_base
from tests.support.workers import run_workers

TINY = ["--hidden_size", 32, "--intermediate_size", 64, "--num_hidden_layers", 4, "--num_attention_heads", 4]
TEXT = ["--block_length", 32, "--eval_rows", 3, "--max_eval_blocks", 16, "--per_device_eval_batch_size", 8]
SHORT = ["--max_steps", 12, "--logging_steps", 3]


@torch.no_grad()
def loss_of(folder: Path, blocks) -> float:
    """In plain transformers, of blocks that are equally long."""
    ids = torch.tensor(blocks["input_ids"])
    return AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=ids, labels=ids).loss.item()


def held_out(files: str, tokenizer: Path):
    streams = load("streams")
    text = streams.StreamArguments(data_files=[files], block_length=32, eval_rows=3, max_eval_blocks=16)
    return streams.held_out(text, AutoTokenizer.from_pretrained(tokenizer))


@pytest.fixture
def files(tmp_path) -> str:
    """The same text, as files of JSON's lines."""
    (tmp_path / "text").mkdir()
    rows = [json.dumps({"text": text[:1000]}) for text in topics.values()]
    for number in range(2):
        (tmp_path / "text" / f"{number}.jsonl").write_text("\n".join(rows[number::2]))
    return str(tmp_path / "text" / "*.jsonl")


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [["--sdp_level", "block", "--dataloader_num_workers", 1], ["--engine", "fsdp2"], ["--engine", "ddp"]],
    ids=lambda options: options[1],
)
def test_pretrain_llama(tmp_path, files, options):
    options = [*options, "--data_files", files, *TINY, *TEXT, *SHORT, "--learning_rate", 1e-2, "--vocab_size", 300]
    launch(EXAMPLES / "pretrain_llama.py", *options, "--output_dir", tmp_path / "out", folder=tmp_path)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["eval_loss"] == pytest.approx(loss_of(tmp_path / "out", held_out(files, tmp_path / "out")), abs=1e-4)
    assert results["eval_loss"] < 5.6  # ln 300 = 5.7
    assert results["steps"] == 12 and results["tokens_per_step"] == 2 * 4 * 32


@pytest.mark.long
def test_a_stream_goes_on_where_it_was(tmp_path, files):
    options = ["--data_files", files, *TINY, *TEXT, *SHORT, "--vocab_size", 300, "--save_strategy", "steps"]
    options += ["--save_steps", 6, "--cache_dir", tmp_path / "models"]
    for name, resumed in {
        "whole": [],
        "parted": ["--resume_from_checkpoint", tmp_path / "whole" / "checkpoint-6"],
    }.items():
        launch(EXAMPLES / "pretrain_llama.py", *options, *resumed, "--output_dir", tmp_path / name, folder=tmp_path)
    whole, parted = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "parted"))
    assert whole["train_loss"] == parted["train_loss"] and whole["eval_loss"] == parted["eval_loss"]


def continue_pretraining(arguments: list):
    """Its main function, in a worker of the tests."""
    sys.argv = ["continue_pretraining.py", *map(str, arguments)]
    load("continue_pretraining").main()


def test_continue_pretraining(tmp_path, files):
    base, out = tiny_base(tmp_path / "base"), tmp_path / "out"
    options = ["--model_name_or_path", base, "--data_files", files, *TEXT, *SHORT, "--learning_rate", 1e-2]
    run_workers(continue_pretraining, [*options, "--disable_tqdm", 1, "--output_dir", out], world_size=2)
    blocks = held_out(files, base)
    assert loss_of(out, blocks) < loss_of(base, blocks) - 0.2
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.long
def test_continue_pretraining_says_what_its_checkpoint_has(tmp_path, files):
    base, out = tiny_base(tmp_path / "base"), tmp_path / "out"
    options = ["--model_name_or_path", base, "--data_files", files, *TEXT, *SHORT]
    options += ["--sdp_level", "block", "--sdp_masking", "forward", "--output_dir", out]
    said = launch(EXAMPLES / "continue_pretraining.py", *options, folder=tmp_path)
    before, after = map(float, re.search(r"before ([\d.]+), after ([\d.]+)", said).groups())
    blocks = held_out(files, base)
    assert loss_of(base, blocks) == pytest.approx(before, abs=1e-3)
    assert loss_of(out, blocks) == pytest.approx(after, abs=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", ["trainer_minimal", "accelerate_loop"])
def test_examples_without_options(tmp_path, name):
    said = launch(EXAMPLES / f"{name}.py", folder=tmp_path)
    last = float(re.findall(r"loss'?:? '?([\d.]+)", said)[-1])
    assert 4 < last < 7  # ln 1024 = 6.9
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "runs" / name)
    assert model.config.num_hidden_layers == 4
    if name == "accelerate_loop":
        said = run(sys.executable, EXAMPLES / "generate.py", tmp_path / "runs" / name, folder=tmp_path)
        assert said.startswith("def __init__(self")


@pytest.mark.long
@pytest.mark.parametrize("options", [[], ["-m", "hf_sdp.run", "--level", "block", "--coverage", "0.5"]], ids=len)
def test_an_existing_script_is_trained_as_it_is_with_sdp_and_without(tmp_path, options):
    script = [EXAMPLES / "existing_script.py", "--max_steps", 15, "--output_dir", tmp_path / "out"]
    said = launch(*options, *script, folder=tmp_path)
    loss = float(re.search(r"evaluation loss ([\d.]+)", said)[1])
    rows = load("existing_script").read_rows()[:64]
    ids = torch.stack([row["input_ids"] for row in rows])
    assert loss_of(tmp_path / "out", {"input_ids": ids.tolist()}) == pytest.approx(loss, abs=1e-4)
    assert loss < 4  # ln 256 = 5.5


@pytest.mark.long
@pytest.mark.parametrize(
    ("option", "said"), [("--dry-run", "2 subnetworks, block level"), ("--compare", "training loss, mean of the last")]
)
def test_what_an_existing_script_would_take_is_printed(tmp_path, option, said):
    options = ["-m", "hf_sdp.run", "--level", "block", option, EXAMPLES / "existing_script.py"]
    assert said in launch(*options, "--output_dir", tmp_path / "out", folder=tmp_path)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.long
@pytest.mark.timeout(1000)
def test_quickstart(tmp_path):
    options = ["--workers", 2, "--steps", 8, "--folder", tmp_path / "quickstart", "--level", "block"]
    variables = dict(COLUMNS="120", HF_DATASETS_CACHE=str(tmp_path / "cache"))
    said = run(sys.executable, "examples/quickstart.py", *options, folder=ROOT, timeout_s=900, **variables)
    ddp, fsdp2, sdp = map(float, re.findall(r"[\d.]+", re.search("parameters, MiB(.*)", said)[1]))
    assert ddp == pytest.approx(2 * sdp, abs=0.2) and fsdp2 == sdp
    assert "SDP's checkpoint in plain transformers" in said
