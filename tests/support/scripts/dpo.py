"""Preferences with TRL, with LoRA or without (as trl/scripts/dpo.py): the reference is what the training began from."""

import sys
from dataclasses import dataclass

from datasets import Dataset
from tiny import WORDS, text
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, ModelConfig, TrlParser, get_peft_config


@dataclass
class ScriptArguments:
    rows: int = 64


def preferences(rows: int, seed: int = 0) -> Dataset:
    """Lines, which are to be gone on with as they do, and not with the word that has the next number."""
    made = []
    for line in text(rows, seed):
        words = line.split()[:16]
        others = [f"w{(int(word[1:]) + 1) % WORDS}" for word in words]
        prompt, chosen, rejected = (" ".join(some) for some in (words[:8], words[8:], others[8:]))
        made.append({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"})
    return Dataset.from_list(made)


def main(arguments: list[str], folder: str | None = None) -> None:
    """``folder``: of a trained model, which is evaluated."""
    parser = TrlParser((ScriptArguments, DPOConfig, ModelConfig))
    script_args, args, model_args = parser.parse_args_and_config(arguments)
    model, reference, adapters = model_args.model_name_or_path, None, get_peft_config(model_args)
    if folder is not None:
        model, reference = AutoModelForCausalLM.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(model)
        adapters = None
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=preferences(script_args.rows), eval_dataset=preferences(8, seed=8),
        ref_model=reference, peft_config=adapters,
    )  # fmt: skip
    if folder is not None:
        print("reloaded", trainer.evaluate()["eval_loss"])
        return
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(args.output_dir)
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()


if __name__ == "__main__":
    if sys.argv[1] == "--reloaded":
        main(sys.argv[3:], sys.argv[2])
    else:
        main(sys.argv[1:])
