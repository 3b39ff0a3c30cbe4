"""The default corpus: the source text of the running Python's standard library. No download, real text."""

import hashlib
import os
import platform
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerFast

if TYPE_CHECKING:  # of the extra hf_sdp[bench]: the functions import them, so that commands can say what is missing
    from datasets import Dataset, DatasetDict

END_OF_TEXT = "<|endoftext|>"
_SKIPPED = {"site-packages", "test", "tests", "idle_test", "__pycache__", "lib2to3", "encodings"}


def standard_library(max_bytes: int | None = None) -> "Dataset":
    """One row ``{"name", "text"}`` a source file, in sorted order, at most ``max_bytes`` of text in all."""
    from datasets import Dataset

    root = Path(sysconfig.get_paths()["stdlib"])
    names, texts, total = [], [], 0
    for path in sorted(root.rglob("*.py")):
        if _SKIPPED & set(path.relative_to(root).parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if max_bytes is not None and total + len(text) > max_bytes:
            break
        names.append(str(path.relative_to(root)))
        texts.append(text)
        total += len(text)
    return Dataset.from_dict({"name": names, "text": texts})


def train_tokenizer(texts: "Dataset", vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of ``vocab_size`` tokens trained on the corpus."""
    from tokenizers import ByteLevelBPETokenizer

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts["text"], vocab_size=vocab_size, special_tokens=[END_OF_TEXT], show_progress=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


def blocks(
    texts: "Dataset", tokenizer: PreTrainedTokenizerFast, length: int, valid_share: float = 0.05
) -> "DatasetDict":
    """The corpus as token blocks ``{"input_ids", "labels"}`` of ``length``; every twentieth file or so is ``valid``.

    Raises: ValueError for a corpus of one row.
    """
    from datasets import DatasetDict

    if len(texts) < 2:
        raise ValueError("one row of text cannot be split: the text is too short. Take more of it.")

    def tokenize(batch):
        return {"ids": [ids + [tokenizer.eos_token_id] for ids in tokenizer(batch["text"])["input_ids"]]}

    def chunk(batch):
        ids = np.concatenate(batch["ids"])
        rows = ids[: len(ids) // length * length].reshape(-1, length)
        return {"input_ids": rows, "labels": rows}

    split = texts.train_test_split(test_size=valid_share, seed=0)
    result = DatasetDict(train=split["train"], valid=split["test"])
    result = result.map(tokenize, batched=True, remove_columns=texts.column_names, desc="tokenize")
    result = result.with_format("numpy")  # lists of a hundred million tokens would not fit
    result = result.map(chunk, batched=True, batch_size=None, remove_columns=["ids"], desc="cut into blocks")
    return result.with_format(None)


def load(vocab_size: int, length: int, max_bytes: int | None = None) -> tuple["DatasetDict", PreTrainedTokenizerFast]:
    """Token blocks of the standard library and the tokenizer trained on it."""
    texts = standard_library(max_bytes)
    tokenizer = train_tokenizer(texts, vocab_size)
    return blocks(texts, tokenizer, length), tokenizer


def text_lines(text_file: str | Path, lines_per_row: int = 200) -> "Dataset":
    """A text file (UTF-8) as rows ``{"name", "text"}`` of ``lines_per_row`` lines each.

    The rows are many, so that a share of them can be ``valid``.
    """
    from datasets import Dataset

    lines = Path(text_file).read_text(encoding="utf-8").splitlines(keepends=True)
    texts = ["".join(lines[i : i + lines_per_row]) for i in range(0, len(lines), lines_per_row)]
    return Dataset.from_dict({"name": [f"row {i}" for i in range(len(texts))], "text": texts})


def make_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Let ``make`` fill ``folder`` unless it is there. It is there whole or not at all, also when processes compete."""
    if folder.exists():
        return
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}")
    make(unfinished)
    try:
        unfinished.rename(folder)
    except OSError:
        if not folder.exists():
            raise
        shutil.rmtree(unfinished)  # another process was quicker


def prepared(
    folder: str | Path, vocab_size: int, length: int, max_bytes: int | None = None, text_file: str | Path | None = None
) -> tuple["DatasetDict", PreTrainedTokenizerFast]:
    """Like :func:`load`, of the standard library or ``text_file``, but made once and kept under ``folder``.

    Several workers: call it under ``main_process_first()``, so that one of them makes it and the others read it.
    Raises: ValueError when the text is too short for one block in ``train`` and one in ``valid``.
    """
    from datasets import load_from_disk

    if text_file is None:
        source = f"python{platform.python_version()}-{max_bytes}"
    else:
        source = hashlib.sha256(Path(text_file).read_bytes()).hexdigest()[:12]
    kept = Path(folder) / f"{source}-{vocab_size}-{length}"

    def make(unfinished: Path) -> None:
        texts = standard_library(max_bytes) if text_file is None else text_lines(text_file)
        tokenizer = train_tokenizer(texts, vocab_size)
        data = blocks(texts, tokenizer, length)
        if not all(data.num_rows.values()):
            raise ValueError(f"{data.num_rows} blocks of {length} tokens: the text is too short. Take more of it.")
        data.save_to_disk(unfinished)
        tokenizer.save_pretrained(unfinished)

    make_once(kept, make)
    return load_from_disk(kept), PreTrainedTokenizerFast.from_pretrained(kept)
