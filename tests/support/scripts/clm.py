"""A causal language model under the Trainer: from scratch or pretrained, resumed, with metrics (as run_clm.py)."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
from tiny import WORDS, loss_of, text, token_rows, tokenizer
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)  # fmt: skip

METRIC = Path(__file__).parents[3] / "examples" / "accuracy"


@dataclass
class ModelArguments:
    model_name_or_path: str | None = None
    model_type: str = "llama"
    config_overrides: str = field(
        default=f"vocab_size={WORDS + 5},hidden_size=32,intermediate_size=64,num_hidden_layers=4,num_attention_heads=4"
    )


def main() -> None:
    model_args, args = HfArgumentParser((ModelArguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(args.seed)
    if model_args.model_name_or_path:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path)
        model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, config=config)
    else:
        config = CONFIG_MAPPING[model_args.model_type]()
        config.update_from_string(model_args.config_overrides)
        config.num_key_value_heads = config.num_attention_heads
        config.head_dim = config.hidden_size // config.num_attention_heads
        model = AutoModelForCausalLM.from_config(config)
    words = tokenizer()
    assert text(1)
    metric = evaluate.load(str(METRIC))

    def compute_metrics(prediction):
        labels, found = prediction.label_ids[:, 1:].reshape(-1), prediction.predictions[:, :-1].reshape(-1)
        return metric.compute(predictions=found, references=labels)

    trainer = Trainer(
        model=model, args=args, train_dataset=token_rows(64), eval_dataset=token_rows(8, seed=1),
        processing_class=words, data_collator=default_data_collator, compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(dim=-1),
    )  # fmt: skip
    result = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    trainer.log_metrics("train", result.metrics)
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)


if __name__ == "__main__":
    if sys.argv[1] == "--reloaded":
        print("reloaded", loss_of(AutoModelForCausalLM.from_pretrained(sys.argv[2]), token_rows(8, seed=1)))
    else:
        main()
