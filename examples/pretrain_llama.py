"""Pretrain a small Llama with SDP, DDP or FSDP2 under the Trainer, and write what it took to a file.

    accelerate launch --config_file configs/accelerate/cpu_4.yaml examples/pretrain_llama.py \\
        --engine sdp --sdp_level neuron --sdp_masking forward --sdp_coverage 0.5 --max_steps 50

Options: the shape of the model, the data, every field of ``SDPConfig`` as ``--sdp_...``, and ``TrainingArguments``.
Every engine starts from the same weights. Text: the source of Python's standard library, or ``--text_file``.
"""

from dataclasses import asdict, dataclass, field

from engines import EngineArguments, initial_model, load_model, train_and_measure
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, default_data_collator
from transformers.utils.logging import disable_progress_bar

from hf_sdp import SDPCallback, SDPConfig
from hf_sdp.bench import corpus
from hf_sdp.bench.small_llama import small_llama

FSDP_MODULES = ("model.embed_tokens", "model.layers.*")


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
class Arguments(EngineArguments):
    """Defaults of this example."""

    output_dir: str = "runs/pretrain_llama"
    max_steps: int = 50
    per_device_train_batch_size: int = 4
    learning_rate: float = 6e-3


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
        folder = initial_model(AutoModelForCausalLM, llama, training.seed, data_args.cache_dir)

    trainer = Trainer(
        model=load_model(AutoModelForCausalLM, folder, training, config, FSDP_MODULES),
        args=training,
        train_dataset=data["train"],
        eval_dataset=data["valid"].select(range(min(data_args.max_eval_blocks, len(data["valid"])))),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[SDPCallback(profile_memory=True)] if training.engine == "sdp" else None,
    )
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    train_and_measure(trainer, config, tokens_per_step=data_args.block_length * batch)


if __name__ == "__main__":
    main()
