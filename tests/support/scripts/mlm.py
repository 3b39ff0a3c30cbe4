"""A masked language model under the Trainer (as run_mlm.py)."""

import sys

import torch
from datasets import Dataset
from tiny import WORDS, loss_of, text, tokenizer
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)  # fmt: skip


def masked_rows(rows: int) -> Dataset:
    """Masked once, so that every evaluation is of the same."""
    torch.manual_seed(0)
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3)
    batch = collator([{"input_ids": ids} for ids in tokenizer()(text(rows, seed=1))["input_ids"]])
    return Dataset.from_dict({name: value.tolist() for name, value in batch.items()}).with_format("torch")


class Evaluated(Trainer):
    """Training rows are masked anew in each epoch, those of evaluation are masked already."""

    def get_eval_dataloader(self, eval_dataset=None):
        collator, self.data_collator = self.data_collator, default_data_collator
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = collator


def main() -> None:
    (args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = AutoModelForMaskedLM.from_config(BertConfig(vocab_size=WORDS + 5, **sizes, **dropout))
    words = tokenizer()
    rows = Dataset.from_dict({"input_ids": words(text(64))["input_ids"]})
    trainer = Evaluated(
        model=model, args=args, train_dataset=rows, eval_dataset=masked_rows(8), processing_class=words,
        data_collator=DataCollatorForLanguageModeling(words, mlm_probability=0.15),
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()


if __name__ == "__main__":
    if sys.argv[1] == "--reloaded":
        print("reloaded", loss_of(AutoModelForMaskedLM.from_pretrained(sys.argv[2]), masked_rows(8)))
    else:
        main()
