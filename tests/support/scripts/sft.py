"""Supervised fine-tuning with TRL, with LoRA or without (as trl/scripts/sft.py)."""

import sys
from dataclasses import dataclass

from datasets import Dataset
from tiny import llama, text, tokenizer
from transformers import AutoModelForCausalLM, HfArgumentParser, set_seed
from trl import SFTConfig, SFTTrainer


@dataclass
class ModelArguments:
    use_peft: bool = False


def base():
    set_seed(0)
    return llama()


def main(arguments: list[str], reloaded=None) -> None:
    model_args, args = HfArgumentParser((ModelArguments, SFTConfig)).parse_args_into_dataclasses(arguments)
    adapters = None
    if model_args.use_peft and reloaded is None:
        from peft import LoraConfig

        adapters = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=reloaded or base(), args=args, train_dataset=Dataset.from_dict({"text": text(64)}),
        eval_dataset=Dataset.from_dict({"text": text(8, seed=1)}), processing_class=tokenizer(), peft_config=adapters,
    )  # fmt: skip
    if reloaded is not None:
        print("reloaded", trainer.evaluate()["eval_loss"])
        return
    trainer.train()
    trainer.save_model(args.output_dir)
    trainer.save_metrics("eval", trainer.evaluate())
    trainer.save_state()


def load(folder: str, use_peft: bool):
    if not use_peft:
        return AutoModelForCausalLM.from_pretrained(folder)
    from peft import PeftModel

    return PeftModel.from_pretrained(base(), folder)


if __name__ == "__main__":
    if sys.argv[1] == "--reloaded":
        main(sys.argv[3:], load(sys.argv[2], "--use_peft" in sys.argv))
    else:
        main(sys.argv[1:])
