"""Fine-tune a language model with LoRA (PEFT) and SDP under the Trainer; what is saved is a standard adapter.

    accelerate launch --config_file configs/accelerate/cpu_4.yaml examples/finetune_lora.py \\
        --model_name_or_path MODEL --text_file FILE --sdp_masking backward --sdp_reshard_after_forward --max_steps 100

As it is, without options, it pretrains a small Llama on the source of Python's standard library for a minute, and
fine-tunes that on the topics of Python's help. Options: the adapters, the data, every field of ``SDPConfig`` as
``--sdp_...``, and ``TrainingArguments``. ``--dense`` is plain LoRA under DDP. Needs the extra ``bench`` and peft.
"""

from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from hf_sdp import SDPCallback, SDPConfig
from hf_sdp.bench import corpus
from hf_sdp.bench.small_llama import small_llama


@dataclass
class ModelArguments:
    """The base, whose weights are frozen, and its adapters, by the names of ``LoraConfig``."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "A folder, or a name on the Hub."})
    lora_r: int = 8
    lora_alpha: int = 16
    lora_target_modules: str = field(default="all-linear", metadata={"help": "Or names, with commas between them."})
    use_dora: bool = False
    dense: bool = field(default=False, metadata={"help": "Without SDP."})


@dataclass
class DataArguments:
    """The text and how it is cut."""

    text_file: str | None = field(default=None, metadata={"help": "A UTF-8 text file instead of Python's help."})
    block_length: int = field(default=128, metadata={"help": "Tokens of one sequence."})
    max_eval_blocks: int = field(default=64, metadata={"help": "Sequences that evaluation reads."})
    cache_dir: str = field(default="runs/cache", metadata={"help": "The small base is kept here."})


@dataclass
class Arguments(TrainingArguments):
    """``TrainingArguments`` with the defaults of this example."""

    output_dir: str = "runs/finetune_lora"
    max_steps: int = 50
    per_device_train_batch_size: int = 4
    learning_rate: float = 4e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    logging_steps: float = 10
    eval_on_start: bool = True  # after evaluate() alone, --dense would train without DDP (transformers 5.23)
    save_strategy: str = "no"
    report_to: str = "none"
    use_cpu: bool = not torch.cuda.is_available()
    ddp_find_unused_parameters: bool | None = False


def small_base(cache_dir: str, length: int, steps: int = 100) -> Path:
    """Folder of a small Llama that has read some Python; made once."""
    folder = Path(cache_dir) / f"small-base-{length}-{steps}"

    def make(unfinished: Path) -> None:
        data, tokenizer = corpus.prepared(cache_dir, vocab_size=1024, length=length, max_bytes=2_000_000)
        set_seed(0)
        model = LlamaForCausalLM(
            small_llama(vocab_size=1024, hidden_size=128, intermediate_size=384, num_hidden_layers=4, use_cache=True)
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
        for rows in data["train"].with_format("torch").select(range(8 * steps)).iter(batch_size=8):
            model(**rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)

    corpus.make_once(folder, make)
    return folder


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, SDPConfig.arguments(), Arguments))
    model_args, data_args, sdp_args, training = parser.parse_args_into_dataclasses()
    disable_progress_bar()
    with training.main_process_first():
        base = model_args.model_name_or_path or small_base(data_args.cache_dir, data_args.block_length)
        tokenizer = AutoTokenizer.from_pretrained(base)
        text = Dataset.from_dict({"name": list(topics), "text": list(topics.values())})
        if data_args.text_file:
            text = corpus.text_lines(data_args.text_file)
        data = corpus.blocks(text, tokenizer, data_args.block_length)
    targets = model_args.lora_target_modules
    adapters = LoraConfig(
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        target_modules=targets.split(",") if "," in targets else targets,
        use_dora=model_args.use_dora,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), adapters)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data["valid"].select(range(min(data_args.max_eval_blocks, len(data["valid"])))),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[] if model_args.dense else [SDPCallback(SDPConfig.from_arguments(sdp_args))],
    )
    trainer.train()
    before = trainer.state.log_history[0]["eval_loss"]
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()  # peft.PeftModel.from_pretrained(base, output_dir) loads it, without hf_sdp
    if trainer.is_world_process_zero():
        print(f"loss of the full model before {before:.3f}, after {after:.3f}; adapters in {training.output_dir}")


if __name__ == "__main__":
    main()
