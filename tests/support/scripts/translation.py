"""A sequence-to-sequence model that generates in evaluation (as run_translation.py, run_summarization.py)."""

import sys

import numpy as np
from datasets import Dataset
from tiny import WORDS, loss_of, text, tokenizer
from transformers import (
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    set_seed,
)  # fmt: skip


def pairs(rows: int, seed: int = 0) -> Dataset:
    """Lines, and the same backwards."""
    ids = tokenizer()(text(rows, seed))["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "labels": [row[::-1] for row in ids]}).with_format("torch")


def main() -> None:
    (args,) = HfArgumentParser(Seq2SeqTrainingArguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=3, num_heads=4)
    config = T5Config(vocab_size=WORDS + 5, **sizes, dropout_rate=0.0, pad_token_id=1, decoder_start_token_id=1)
    model = AutoModelForSeq2SeqLM.from_config(config)
    words = tokenizer()

    def compute_metrics(prediction):
        found = np.where(prediction.predictions != -100, prediction.predictions, words.pad_token_id)
        return {"length": float(np.mean([np.count_nonzero(row != words.pad_token_id) for row in found]))}

    trainer = Seq2SeqTrainer(
        model=model, args=args, train_dataset=pairs(64), eval_dataset=pairs(8, seed=1), processing_class=words,
        data_collator=DataCollatorForSeq2Seq(words, model=model), compute_metrics=compute_metrics,
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate(max_length=8, num_beams=1))
    trainer.save_metrics("predict", trainer.predict(pairs(4, seed=2), max_length=8, num_beams=2).metrics)
    trainer.save_state()


if __name__ == "__main__":
    if sys.argv[1] == "--reloaded":
        print("reloaded", loss_of(AutoModelForSeq2SeqLM.from_pretrained(sys.argv[2]), pairs(8, seed=1)))
    else:
        main()
