"""Text, a tokenizer and a model that need no network, and how a loop with Accelerate ends."""

import json
import math
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, default_data_collator

WORDS = 200
LENGTH = 32


def tokenizer() -> PreTrainedTokenizerFast:
    """Words, by their first letters: few enough for a tiny model."""
    special = ["<unk>", "<pad>", "<s>", "</s>", "<mask>"]
    vocabulary = {word: number for number, word in enumerate([*special, *(f"w{i}" for i in range(WORDS))])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
    )


def text(rows: int, seed: int = 0) -> list[str]:
    """Lines of Python's help as words of the tokenizer; a word that comes often has a low number."""
    words = " ".join(topics.values()).split()
    start = seed * rows * LENGTH
    numbers = [sum(map(ord, word[:2])) % WORDS for word in words[start : start + rows * LENGTH]]
    return [" ".join(f"w{n}" for n in numbers[i : i + LENGTH]) for i in range(0, len(numbers), LENGTH)]


def token_rows(rows: int, seed: int = 0) -> Dataset:
    ids = tokenizer()(text(rows, seed))["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "labels": ids}).with_format("torch")


@torch.no_grad()
def loss_of(model, rows: Dataset) -> float:
    """In plain transformers: of all rows at once."""
    return model.eval()(**rows[:]).loss.item()


def llama():
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=WORDS + 5, **sizes))


def loader_of(rows: Dataset, **options) -> DataLoader:
    return DataLoader(rows, collate_fn=default_data_collator, **options)


def evaluate_and_save(accelerator, model, eval_loader, losses: list[float], folder: Path) -> None:
    """In ``folder`` the model, and what was found: its losses in training and in evaluation."""
    model.eval()
    of_batches = []
    for batch in eval_loader:
        with torch.no_grad():
            loss = model(**batch).loss
        of_batches.append(accelerator.gather_for_metrics(loss.repeat(len(batch["labels"]))))
    eval_loss = torch.cat(of_batches).mean().item()
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(model).save_pretrained(
        folder, is_main_process=accelerator.is_main_process, save_function=accelerator.save,
        state_dict=accelerator.get_state_dict(model),
    )  # fmt: skip
    if accelerator.is_main_process:
        results = {"eval_loss": eval_loss, "losses": losses, "perplexity": math.exp(eval_loss)}
        (folder / "all_results.json").write_text(json.dumps(results))
