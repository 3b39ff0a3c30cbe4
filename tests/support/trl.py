"""Data of tiny models for TRL's trainers."""

import os

import torch

from tests.support.models import VOCAB

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # of every worker
ARGUMENTS = dict(
    per_device_train_batch_size=2, per_device_eval_batch_size=2, max_steps=3, gradient_accumulation_steps=2,
    learning_rate=1e-2, logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, use_cpu=True, seed=0,
    lr_scheduler_type="constant", max_length=16, bf16=False, gradient_checkpointing=False,
)  # fmt: skip


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2")


def text(generator: torch.Generator, length: int) -> str:
    return " ".join(f"w{i}" for i in torch.randint(3, VOCAB, (length,), generator=generator).tolist())


def rows(kind: str, num_rows: int, seed: int):
    from datasets import Dataset

    g = torch.Generator().manual_seed(seed)
    if kind == "sft":
        return Dataset.from_list([{"text": text(g, 12 if row % 3 else 7)} for row in range(num_rows)])
    if kind == "reward":
        return Dataset.from_list([{"chosen": text(g, 8), "rejected": text(g, 6)} for _ in range(num_rows)])
    return Dataset.from_list(
        [{"prompt": text(g, 4), "chosen": " " + text(g, 6), "rejected": " " + text(g, 5)} for _ in range(num_rows)]
    )
