"""Pretrain a Llama on a stream of text with SDP, DDP or FSDP2 under the Trainer, and write what it took to a file.

    accelerate launch --config_file configs/accelerate/gpu_8.yaml examples/pretrain_llama.py \\
        --dataset_name HuggingFaceFW/fineweb --dataset_config_name sample-10BT --eval_rows 500 --block_length 1024 \\
        --tokenizer_name gpt2 --hidden_size 768 --intermediate_size 2048 --num_hidden_layers 12 \\
        --num_attention_heads 12 --initializer_range 0.02 --learning_rate 6e-4 --max_steps 20000 \\
        --sdp_level block --sdp_coverage 0.5

Without a network, on local files: ``--data_files 'text/*.parquet'`` (or JSON, or text) instead of the data set. As it
is, without options, it trains on the source of Python's standard library for a minute, also on a CPU:

    accelerate launch --config_file configs/accelerate/cpu_4.yaml examples/pretrain_llama.py --sdp_level neuron

Options: the shape of the model, the data, every field of ``SDPConfig`` as ``--sdp_...``, ``--engine``, and
``TrainingArguments``. Every engine starts from the same weights. Needs the extra ``bench``.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path

from engines import EngineArguments, initial_model, load_model, train_and_measure
from streams import StreamArguments, held_out, rows, training_blocks
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    Trainer,
    default_data_collator,
)
from transformers.utils.logging import disable_progress_bar

from hf_sdp import SDPCallback, SDPConfig
from hf_sdp.bench import corpus
from hf_sdp.bench.small_llama import small_llama

FSDP_MODULES = ("model.embed_tokens", "model.layers.*")


@dataclass
class ModelArguments:
    """Shape of the Llama, by the names of ``LlamaConfig``. Defaults: 6.4 M parameters that
    learn within a hundred steps (a larger initializer range than LlamaConfig's, for a small width)."""

    hidden_size: int = 256
    intermediate_size: int = 704
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    initializer_range: float = 0.08


@dataclass
class TokenizerArguments:
    """A published tokenizer, or one that is trained on the text."""

    tokenizer_name: str | None = field(default=None, metadata={"help": "A folder, or a name on the hub."})
    vocab_size: int = field(default=1024, metadata={"help": "Without it: tokens of one that is trained here."})
    tokenizer_rows: int = field(default=1000, metadata={"help": "On so many rows, after those that are held out."})
    cache_dir: str = field(default="runs/cache", metadata={"help": "It and initial weights are kept here."})


@dataclass
class Arguments(EngineArguments):
    """Defaults of this example."""

    output_dir: str = "runs/pretrain_llama"
    max_steps: int = 50
    per_device_train_batch_size: int = 4
    learning_rate: float = 6e-3


def tokenizer_of(arguments: TokenizerArguments, text: StreamArguments) -> PreTrainedTokenizerBase:
    """The one that is named; else one of the text's first rows, made once."""
    if arguments.tokenizer_name is not None:
        return AutoTokenizer.from_pretrained(arguments.tokenizer_name)
    key = hashlib.sha256(f"{text}{arguments}".encode()).hexdigest()[:12]
    folder = Path(arguments.cache_dir) / f"tokenizer-{key}"

    def make(unfinished: Path) -> None:
        first = rows(text).skip(text.eval_rows).take(arguments.tokenizer_rows)
        texts = {"text": [row[text.text_column] for row in first]}
        corpus.train_tokenizer(texts, arguments.vocab_size).save_pretrained(unfinished)

    corpus.make_once(folder, make)
    return AutoTokenizer.from_pretrained(folder)


def main() -> None:
    parser = HfArgumentParser((ModelArguments, TokenizerArguments, StreamArguments, SDPConfig.arguments(), Arguments))
    shape, tokenizer_args, text, sdp_args, training = parser.parse_args_into_dataclasses()
    config = SDPConfig.from_arguments(sdp_args)
    disable_progress_bar()  # of loading weights, on every worker; the Trainer's stays
    with training.main_process_first():
        tokenizer = tokenizer_of(tokenizer_args, text)
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        sizes = dict(vocab_size=len(tokenizer), max_position_embeddings=text.block_length)
        llama = small_llama(**asdict(shape), **sizes, **special, use_cache=True)
        folder = initial_model(AutoModelForCausalLM, llama, training.seed, tokenizer_args.cache_dir)

    trainer = Trainer(
        model=load_model(AutoModelForCausalLM, folder, training, config, FSDP_MODULES),
        args=training,
        train_dataset=training_blocks(text, tokenizer, training),
        eval_dataset=held_out(text, tokenizer),
        processing_class=tokenizer,
        data_collator=default_data_collator,
        callbacks=[SDPCallback(profile_memory=True)] if training.engine == "sdp" else None,
    )
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    train_and_measure(trainer, config, tokens_per_step=text.block_length * batch)


if __name__ == "__main__":
    main()
