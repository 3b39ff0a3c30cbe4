"""Continue the pretraining of a published model with SDP under the Trainer; what is saved is a standard checkpoint.

    accelerate launch --config_file configs/accelerate/gpu_8.yaml examples/continue_pretraining.py \\
        --model_name_or_path meta-llama/Llama-3.2-1B --dataset_name HuggingFaceFW/fineweb \\
        --dataset_config_name sample-10BT --eval_rows 500 --block_length 1024 --bf16 --max_steps 2000

No worker ever has the full model in memory. Without a network: a folder as the model, and ``--data_files
'text/*.jsonl'`` (or parquet, or text) instead of the data set. Options: the data, every field of ``SDPConfig`` as
``--sdp_...``, and ``TrainingArguments``. Needs the extra ``bench``.

Masking is "backward" unless you say otherwise: the forward is then the pretrained one. Under forward masking a
subnetwork of a pretrained model is another model, and much worse at first; where memory asks for it, take a high
coverage (``--sdp_masking forward --sdp_coverage 0.75``).
"""

from dataclasses import dataclass, field

from engines import ExampleArguments
from streams import StreamArguments, held_out, training_blocks
from transformers import AutoTokenizer, HfArgumentParser, Trainer, default_data_collator
from transformers.utils.logging import disable_progress_bar

import hf_sdp
from hf_sdp import SDPCallback, SDPConfig


@dataclass
class ModelArguments:
    """The model to go on from."""

    model_name_or_path: str = field(metadata={"help": "A folder, or a name on the hub."})


@dataclass
class Arguments(ExampleArguments):
    """Defaults of this example."""

    output_dir: str = "runs/continue_pretraining"
    max_steps: int = 50
    per_device_train_batch_size: int = 4
    learning_rate: float = 3e-4
    eval_on_start: bool = True


def main() -> None:
    parser = HfArgumentParser((ModelArguments, StreamArguments, SDPConfig.arguments(), Arguments))
    parser.set_defaults(sdp_masking="backward")
    model_args, text, sdp_args, training = parser.parse_args_into_dataclasses()
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    trainer = Trainer(
        model=hf_sdp.from_pretrained(model_args.model_name_or_path, SDPConfig.from_arguments(sdp_args)),
        args=training,
        train_dataset=training_blocks(text, tokenizer, training),
        eval_dataset=held_out(text, tokenizer),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[SDPCallback()],
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    before = trainer.state.log_history[0]["eval_loss"]
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()  # a standard checkpoint of the full model
    if trainer.is_world_process_zero():
        print(f"loss of the full model before {before:.3f}, after {after:.3f}; checkpoint in {training.output_dir}")


if __name__ == "__main__":
    main()
