"""A sequence-to-sequence model that generates in evaluation.

As run_translation.py and run_summarization.py: they differ in what a row is, in their metric, and in whether lengths
and beams come with the call or with the arguments. The calls, and their order, are the same.
"""

import sys
from pathlib import Path

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
    lines = text(rows, seed)
    backwards = [" ".join(reversed(line.split())) for line in lines]
    return Dataset.from_dict(dict(tokenizer()(lines, text_target=backwards))).with_format("torch")


def main() -> None:
    (args,) = HfArgumentParser(Seq2SeqTrainingArguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=3, num_decoder_layers=3, num_heads=4)
    config = T5Config(vocab_size=WORDS, **sizes, dropout_rate=0.0, pad_token_id=1, decoder_start_token_id=1)
    model = AutoModelForSeq2SeqLM.from_config(config)
    words = tokenizer()
    if len(words) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(words))

    def compute_metrics(prediction):
        found = np.where(prediction.predictions != -100, prediction.predictions, words.pad_token_id)
        return {"gen_len": float(np.mean([np.count_nonzero(row != words.pad_token_id) for row in found]))}

    trainer = Seq2SeqTrainer(
        model=model, args=args, train_dataset=pairs(64), eval_dataset=pairs(8, seed=1), processing_class=words,
        data_collator=DataCollatorForSeq2Seq(words, model=model, label_pad_token_id=-100, pad_to_multiple_of=8),
        compute_metrics=compute_metrics,
    )  # fmt: skip
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_metrics("eval", trainer.evaluate(metric_key_prefix="eval"))  # lengths of the arguments
    predicted = trainer.predict(pairs(4, seed=2), metric_key_prefix="predict", max_length=8, num_beams=2)
    trainer.save_metrics("predict", predicted.metrics)
    if trainer.is_world_process_zero():
        found = np.where(predicted.predictions != -100, predicted.predictions, words.pad_token_id)
        lines = words.batch_decode(found, skip_special_tokens=True)
        Path(args.output_dir, "generated_predictions.txt").write_text("\n".join(lines))


if __name__ == "__main__":
    if sys.argv[1] == "--reloaded":
        print("reloaded", loss_of(AutoModelForSeq2SeqLM.from_pretrained(sys.argv[2]), pairs(8, seed=1)))
    else:
        main()
