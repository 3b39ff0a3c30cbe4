"""Somebody's training script, which knows nothing of SDP: a small Llama reads the source of Python's standard library.

    accelerate launch --config_file configs/accelerate/cpu_4.yaml examples/existing_script.py  # as it is

With SDP, without a change; what that would take; and 20 steps each of DDP, FSDP2 and SDP, as a table:

    launch="accelerate launch --config_file configs/accelerate/cpu_4.yaml"
    $launch -m hf_sdp.run --level block --coverage 0.5 examples/existing_script.py
    $launch -m hf_sdp.run --level block --coverage 0.5 --dry-run examples/existing_script.py
    $launch -m hf_sdp.run --level block --coverage 0.5 --compare examples/existing_script.py

Options: ``TrainingArguments``. Tokens are bytes.
"""

import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed


@dataclass
class Arguments(TrainingArguments):
    """Defaults for a minute on a CPU."""

    output_dir: str = "runs/existing_script"
    use_cpu: bool = not torch.cuda.is_available()
    max_steps: int = 60
    learning_rate: float = 3e-3
    logging_steps: float = 10
    save_strategy: str = "no"
    report_to: str = "none"


def read_rows() -> list[dict[str, torch.Tensor]]:
    """Rows of 128 bytes, int64."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
    return [{"input_ids": ids, "labels": ids} for ids in text.split(128)[:-1]]


def main() -> None:
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    rows = read_rows()
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    trainer = Trainer(LlamaForCausalLM(config), args, train_dataset=rows[64:], eval_dataset=rows[:64])
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        print(f"evaluation loss {metrics['eval_loss']:.4f}")


if __name__ == "__main__":
    main()
