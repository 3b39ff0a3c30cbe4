"""Pretrain a small Llama with SDP, DDP or FSDP2 under the Trainer, and write what it took to a file.

    accelerate launch --config_file configs/accelerate/cpu_4.yaml examples/pretrain_llama.py \\
        --engine sdp --sdp_level neuron --sdp_masking forward --sdp_coverage 0.5 --max_steps 50

Options: the shape of the model, the data, every field of ``SDPConfig`` as ``--sdp_...``, and ``TrainingArguments``.
Every engine starts from the same weights. Text: the source of Python's standard library, or ``--text_file``.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from measure import MeterCallback, measurements
from transformers import (
    AutoModelForCausalLM,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.distributed import DistributedConfig
from transformers.utils.logging import disable_progress_bar

from hf_sdp import SDPCallback, SDPConfig, patch_model
from hf_sdp.bench import corpus
from hf_sdp.bench.small_llama import small_llama


@dataclass
class ModelArguments:
    """Shape of the Llama, by the names of ``LlamaConfig``. Defaults: 6.4 M parameters that
    learn within a hundred steps (a larger initializer range than LlamaConfig's, for a small width)."""

    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    initializer_range: float = 0.08


@dataclass
class DataArguments:
    """The text and how it is cut."""

    text_file: str | None = field(default=None, metadata={"help": "A UTF-8 text file instead of the standard library."})
    max_bytes: int = field(default=4_000_000, metadata={"help": "Text taken from the standard library."})
    block_length: int = field(default=128, metadata={"help": "Tokens of one sequence."})
    max_eval_blocks: int = field(default=128, metadata={"help": "Sequences that evaluation reads."})
    cache_dir: str = field(default="runs/cache", metadata={"help": "Token blocks and initial weights are kept here."})


@dataclass
class Arguments(TrainingArguments):
    """``TrainingArguments`` with the defaults of this example."""

    engine: Literal["sdp", "ddp", "fsdp2"] = field(default="sdp", metadata={"help": "How workers share the model."})
    output_dir: str = "runs/pretrain_llama"
    results_file: str = field(default="runs/pretrain_llama/results.json", metadata={"help": "Measurements, as JSON."})
    use_cpu: bool = not torch.cuda.is_available()
    ddp_find_unused_parameters: bool | None = False  # there are none: DDP at its fastest
    max_steps: int = 50
    per_device_train_batch_size: int = 4
    learning_rate: float = 6e-3
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    logging_steps: float = 10
    log_level: str = "warning"
    save_strategy: str = "no"
    report_to: str = "none"


def initial_model(config: LlamaConfig, seed: int, cache_dir: str) -> Path:
    """Folder with randomly initialized weights, made once: every engine and every worker starts from them."""
    key = hashlib.sha256(f"{config.to_json_string()}{seed}".encode()).hexdigest()[:12]
    folder = Path(cache_dir) / f"llama-{key}"

    def make(unfinished: Path) -> None:
        set_seed(seed)
        LlamaForCausalLM(config).save_pretrained(unfinished)

    corpus.make_once(folder, make)
    return folder


def load_model(folder: Path, engine: str, config: SDPConfig, num_workers: int) -> PreTrainedModel:
    """The model as the engine wants it: sharded for FSDP2, patched for SDP, whole for DDP (the Trainer wraps it).

    FSDP2 is the one of transformers, because it also works on CPU; there Accelerate ignores ``TrainingArguments(fsdp=
    ...)`` and trains with DDP. It reshards after forward as SDP does, so that the two differ in nothing else.
    """
    if engine == "fsdp2":
        plan = None
        if not config.reshard_after_forward:
            plan = dict.fromkeys(("model.embed_tokens", "model.layers.*"), "keep_full_weight")
        sharding = DistributedConfig(fsdp_size=num_workers, fsdp_plan=plan)
        return AutoModelForCausalLM.from_pretrained(folder, distributed_config=sharding)
    model = AutoModelForCausalLM.from_pretrained(folder)
    return patch_model(model, config) if engine == "sdp" else model


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, SDPConfig.arguments(), Arguments))
    shape, data_args, sdp_args, training = parser.parse_args_into_dataclasses()
    config = SDPConfig.from_arguments(sdp_args)
    disable_progress_bar()  # of loading weights, on every worker; the Trainer's stays
    with training.main_process_first():
        data, tokenizer = corpus.prepared(
            data_args.cache_dir, shape.vocab_size, data_args.block_length, data_args.max_bytes, data_args.text_file
        )
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        positions = data_args.block_length
        llama = small_llama(**asdict(shape), **special, max_position_embeddings=positions, use_cache=True)
        folder = initial_model(llama, training.seed, data_args.cache_dir)

    model = load_model(folder, training.engine, config, training.world_size)
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=data["train"],
        eval_dataset=data["valid"].select(range(min(data_args.max_eval_blocks, len(data["valid"])))),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[SDPCallback()] if training.engine == "sdp" else None,
    )
    if training.engine != "sdp":
        trainer.add_callback(MeterCallback(trainer))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    evaluation = trainer.evaluate()  # of the full model
    trainer.save_model()  # a standard checkpoint of the full model, whatever the engine

    if trainer.is_world_process_zero():
        results = {
            "engine": training.engine,
            "sdp": asdict(config) if training.engine == "sdp" else None,
            "workers": training.world_size,
            "steps": trainer.state.global_step,
            "tokens_per_step": data_args.block_length
            * training.train_batch_size
            * training.gradient_accumulation_steps
            * training.world_size,
            **measurements(trainer),
            "eval_loss": evaluation.get("eval_loss"),  # not there with --sdp_evaluate subnetwork
        }
        Path(training.results_file).parent.mkdir(parents=True, exist_ok=True)
        Path(training.results_file).write_text(json.dumps(results, indent=2) + "\n")
        print(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
