"""MODEL of the command line: a named size, a local folder or config.json, or a name on the Hugging Face hub."""

import json
from pathlib import Path

from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from .errors import CommandError

_LLAMA = dict(vocab_size=32000, tie_word_embeddings=False, max_position_embeddings=4096)
NAMED = {
    "llama-134m": dict(hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12),
    "llama-500m": dict(hidden_size=1280, intermediate_size=3584, num_hidden_layers=20, num_attention_heads=20),
    "llama-1b": dict(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4
    ),
    "llama-7b": dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
}
"""Named sizes. ``llama-1b`` has TinyLlama-1.1B's shape, ``llama-7b`` Llama-2-7B's."""


def load_config(model: str) -> PretrainedConfig:
    """The transformers config of MODEL; no weights are read.

    Raises: CommandError when there is no such model, the file cannot be read, or the hub cannot be reached.
    """
    if model in NAMED:
        return LlamaConfig(**_LLAMA, **NAMED[model], architectures=["LlamaForCausalLM"])
    path = Path(model).expanduser()
    if path.is_file():
        path = path.parent if path.name == "config.json" else path
    if path.exists():
        if path.is_dir() and not (path / "config.json").is_file():
            raise CommandError(f"{model} has no config.json.")
        try:
            return AutoConfig.from_pretrained(str(path))
        except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
            raise CommandError(f"{model} cannot be read as a transformers config: {error}") from error
    try:
        return AutoConfig.from_pretrained(model)
    except Exception as error:  # the hub's errors have no common class: no network, no such name, no permission
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CommandError(
            f"MODEL {model!r} is no named size ({', '.join(NAMED)}), no local folder or config.json, and could not be had "
            f"from the hub: {reason}"
        ) from error
