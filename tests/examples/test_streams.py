"""examples/streams.py: text of the hub or of files, by one path, in blocks that workers share."""

import json
import re
from pydoc_data.topics import topics

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset
from transformers import AutoTokenizer, Trainer, TrainingArguments

from tests.support.examples import load, tiny_base
from tests.support.models import tiny_model
from tests.support.workers import run_workers

streams = load("streams")
TEXTS = [re.sub("\n+", "\n", text).strip()[:1500] for text in list(topics.values())[:40]]
LENGTH, HELD_OUT = 32, 3


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(tiny_base(tmp_path_factory.mktemp("base")))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def arguments_for(folder, kind: str):
    """The same rows, in files of each kind that is read."""
    options = {}
    if kind == "documents":
        for number, text in enumerate(TEXTS):
            (folder / f"{number:02}.txt").write_text(text)
    elif kind == "paragraphs":
        (folder / "all.txt").write_text("\n\n".join(TEXTS))
        options["text_rows"] = "paragraph"
    elif kind == "json":
        (folder / "all.jsonl").write_text("".join(json.dumps({"text": text, "id": 1}) + "\n" for text in TEXTS))
    elif kind == "parquet":
        for part in range(2):
            table = pyarrow.table({"id": [1] * 20, "content": TEXTS[20 * part : 20 * part + 20]})
            pyarrow.parquet.write_table(table, folder / f"{part}.parquet")
        options["text_column"] = "content"
    return streams.StreamArguments(
        data_files=[f"{folder}/*.*"], block_length=LENGTH, eval_rows=HELD_OUT, max_eval_blocks=4, **options
    )


def expected(texts: list[str], tokenizer) -> list[list[int]]:
    ids = [token for text in texts for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    return [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]


@pytest.mark.parametrize("kind", ["documents", "paragraphs", "json", "parquet"])
def test_files_of_each_kind_become_the_same_blocks(tmp_path, tokenizer, kind):
    arguments = arguments_for(tmp_path, kind)
    training = TrainingArguments(per_device_train_batch_size=4, use_cpu=True, report_to="none")
    held_out = streams.held_out(arguments, tokenizer)
    assert held_out["input_ids"] == held_out["labels"] == expected(TEXTS[:HELD_OUT], tokenizer)[:4]
    found = [row["input_ids"] for row in streams.training_blocks(arguments, tokenizer, training)]
    blocks = expected(TEXTS[HELD_OUT:], tokenizer)
    assert len(found) == len(blocks) // 4 * 4 and found != blocks[: len(found)]  # whole batches, shuffled
    assert {*map(tuple, found)} <= {*map(tuple, blocks)}


def test_fineweb_is_asked_for_by_its_name_and_goes_the_same_way(monkeypatch, tokenizer):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return Dataset.from_dict({"text": TEXTS, "url": TEXTS, "score": [0.5] * 40}).to_iterable_dataset(num_shards=4)

    monkeypatch.setattr(streams, "load_dataset", load_dataset)
    fineweb = streams.StreamArguments("HuggingFaceFW/fineweb", "sample-10BT", block_length=LENGTH, eval_rows=HELD_OUT)
    assert streams.held_out(fineweb, tokenizer)["input_ids"] == expected(TEXTS[:HELD_OUT], tokenizer)[:128]
    training = TrainingArguments(per_device_train_batch_size=1, use_cpu=True, report_to="none")
    found = [row["input_ids"] for row in streams.training_blocks(fineweb, tokenizer, training)]
    assert sorted(found) == sorted(expected(TEXTS[HELD_OUT:], tokenizer))
    call = ("HuggingFaceFW/fineweb", "sample-10BT"), dict(data_files=None, split="train", streaming=True)
    assert calls == [call, call]


def test_what_would_train_on_rows_that_are_held_out_is_refused(tokenizer):
    training = TrainingArguments(dataloader_num_workers=2, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="held out"):
        streams.training_blocks(streams.StreamArguments(), tokenizer, training)


def test_rows_that_are_too_few_to_evaluate_are_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("few")
    with pytest.raises(ValueError, match="less than a block: raise --eval_rows"):
        streams.held_out(streams.StreamArguments(data_files=[f"{tmp_path}/a.txt"]), tokenizer)


def read(folder, base, batch):
    """What this worker gets in each of two epochs of the Trainer's own loader."""
    streams = load("streams")
    training = TrainingArguments(
        str(folder), per_device_train_batch_size=batch, max_steps=1, use_cpu=True, report_to="none"
    )
    text = streams.StreamArguments(data_files=[f"{folder}/*.txt"], block_length=LENGTH, eval_rows=HELD_OUT)
    blocks = streams.training_blocks(text, AutoTokenizer.from_pretrained(base), training)
    loader = Trainer(tiny_model(), training, train_dataset=blocks).get_train_dataloader()
    return [[tuple(row) for batch in loader for row in batch["input_ids"].tolist()] for _ in range(2)]


def test_no_row_is_seen_twice_and_workers_end_together(tmp_path):
    arguments_for(tmp_path, "documents")
    base = tiny_base(tmp_path / "base")
    blocks = {*map(tuple, expected(TEXTS[HELD_OUT:], AutoTokenizer.from_pretrained(base)))}
    batch = next(batch for batch in range(3, 10) if len(blocks) % (2 * batch))  # the end is uneven
    steps = len(blocks) // (2 * batch)
    first, second = run_workers(read, tmp_path, base, batch, world_size=2)
    for epoch in range(2):
        assert len(first[epoch]) == len(second[epoch]) == steps * batch
        seen = {*first[epoch], *second[epoch]}
        assert len(seen) == steps * 2 * batch and seen <= blocks
    assert first[0] != first[1]  # another order
