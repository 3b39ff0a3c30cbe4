"""Text and a tokenizer that need no network."""

from pydoc_data.topics import topics

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
