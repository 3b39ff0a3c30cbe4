"""Text that is read while a model trains on it: of the hub or of local files, packed into blocks of tokens on the way.

Rows of text come from one call of ``datasets.load_dataset(..., streaming=True)``, whether they are FineWeb's or those
of files. The first ones are held out. A row ends with the end-of-sequence token, and rows follow each other in blocks
of one length; of every 1000 rows less than one block is left over.

Under the Trainer rank 0 reads such a stream and sends the other workers their rows (Accelerate's ``dispatch_batches``).
So no row is seen twice, and all workers come to the end together.
"""

import glob
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from datasets import Dataset, IterableDataset, load_dataset
from transformers import PreTrainedTokenizerBase, TrainingArguments

READERS = {".json": "json", ".parquet": "parquet"}
"""In the name of a file (.jsonl and .json.gz, too) -> what reads it. All else is text."""
STANDARD_LIBRARY = f"{sysconfig.get_paths()['stdlib']}/*.py"


@dataclass
class StreamArguments:
    """The text and how it is cut."""

    dataset_name: str | None = field(default=None, metadata={"help": "Of the hub: HuggingFaceFW/fineweb."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration: sample-10BT."})
    dataset_split: str = "train"
    data_files: list[str] | None = field(
        default=None,
        metadata={"help": "Text, JSON or parquet files, * is any name. By default Python's standard library."},
    )
    text_column: str = field(default="text", metadata={"help": "Of JSON and parquet files, and of a data set."})
    text_rows: Literal["document", "paragraph", "line"] = field(
        default="document",
        metadata={"help": "A row of a text file: all of it, what is between empty lines, or a line."},
    )
    block_length: int = field(default=128, metadata={"help": "Tokens of one sequence."})
    eval_rows: int = field(default=10, metadata={"help": "Rows that are held out: the first ones."})
    max_eval_blocks: int = field(default=128, metadata={"help": "Sequences that evaluation reads."})
    shuffle_buffer: int = field(default=1000, metadata={"help": "Sequences among which the next one is drawn."})


def reader_of(pattern: str) -> str:
    """What reads the first file that is meant."""
    name = Path(next(iter(glob.glob(pattern)), pattern)).name
    return next((reader for ending, reader in READERS.items() if ending in name), "text")


def rows(arguments: StreamArguments) -> IterableDataset:
    """All rows, with the column of the text alone."""
    files = arguments.data_files
    if files is None and arguments.dataset_name is None:
        files = [STANDARD_LIBRARY]
    reader = arguments.dataset_name or reader_of(files[0])
    options = {"sample_by": arguments.text_rows} if reader == "text" else {}
    split, name = arguments.dataset_split, arguments.dataset_config_name
    stream = load_dataset(reader, name, data_files=files, split=split, streaming=True, **options)
    return stream.select_columns([arguments.text_column])


def blocks(stream: IterableDataset, arguments: StreamArguments, tokenizer: PreTrainedTokenizerBase) -> IterableDataset:
    """Rows ``{"input_ids", "labels"}`` of ``block_length`` tokens."""
    length = arguments.block_length

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = tokenizer(batch[arguments.text_column], return_attention_mask=False, verbose=False)["input_ids"]
        ids = [token for text in texts for token in (*text, tokenizer.eos_token_id)]
        cut = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
        return {"input_ids": cut, "labels": cut}

    return stream.map(pack, batched=True, remove_columns=[arguments.text_column])


def held_out(arguments: StreamArguments, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Blocks of the rows that are held out, in memory. Raises: ValueError when there is none."""
    stream = blocks(rows(arguments).take(arguments.eval_rows), arguments, tokenizer)
    found = list(stream.take(arguments.max_eval_blocks))
    if not found:
        raise ValueError(
            f"{arguments.eval_rows} rows are less than a block: raise --eval_rows or lower --block_length."
        )
    return Dataset.from_list(found)


def training_blocks(
    arguments: StreamArguments, tokenizer: PreTrainedTokenizerBase, training: TrainingArguments
) -> IterableDataset:
    """Blocks of all other rows, shuffled within a buffer, in another order in each epoch.

    Raises: ValueError for several data loader workers: each would leave out first rows of its own.
    """
    if training.dataloader_num_workers > 1:
        raise ValueError("--dataloader_num_workers: one reads ahead. Several would train on rows that are held out.")
    stream = blocks(rows(arguments).skip(arguments.eval_rows), arguments, tokenizer)
    stream = stream.shuffle(seed=training.seed, buffer_size=arguments.shuffle_buffer)
    # What is too little for a batch of all workers is dropped: Accelerate would fill it up with the first rows.
    of_all = training.train_batch_size * training.world_size
    return stream.map(lambda batch: batch, batched=True, batch_size=of_all, drop_last_batch=True)
