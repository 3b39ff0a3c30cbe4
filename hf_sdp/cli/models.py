"""MODEL of the command line: a named size, a local folder or config.json, or a name on the Hugging Face hub."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_url
from torch import nn
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

from ..errors import SDPConfigError
from ..families.meta_model import meta_model
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
_HUB_TIMEOUT_S = 5
MAX_LAYERS = 4096
"""Of a model that is looked at layer by layer: a config with more is a mistake, and would take hours."""


def load_config(model: str) -> PretrainedConfig:
    """The transformers config of MODEL; no weights are read.

    A name of the hub is looked up in the local cache first, and asked for once: without network there is an answer
    within seconds.

    Raises: CommandError when there is no such model, the file cannot be read, or the hub cannot be reached.
    """
    if model in NAMED:
        return LlamaConfig(**_LLAMA, **NAMED[model], architectures=["LlamaForCausalLM"])
    if not model:
        raise CommandError("MODEL is empty.")
    try:
        path = Path(model).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:  # too long a name, an unknown user's home
        raise CommandError(f"MODEL {short_text(model)} is no path: {first_line(error)}") from error
    if is_folder:
        path = path / "config.json"
        if not path.is_file():
            raise CommandError(f"{model} has no config.json.")
    if path.is_file():
        try:
            return AutoConfig.from_pretrained(str(path))
        except Exception as error:  # unreadable, no JSON, an unknown model_type, values of wrong types: no common class
            raise CommandError(f"{path} cannot be read as a transformers config: {first_line(error)}") from error
    if path.is_absolute() or model.startswith((".", "~")) or model.endswith(".json"):
        raise CommandError(f"There is no folder or file {model}.")
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True)
    except Exception:  # not in the cache, or no possible name: the hub says which
        pass
    try:
        # transformers would try six times, half a minute in all, and write a warning each time.
        get_hf_file_metadata(hf_hub_url(model, "config.json"), timeout=_HUB_TIMEOUT_S)
        return AutoConfig.from_pretrained(model)
    except Exception as error:  # no network, no such name, no permission: no common class
        raise CommandError(
            f"MODEL {model!r} is no named size ({', '.join(NAMED)}), no local folder or config.json, and could not be "
            f"had from the hub: {first_line(error)}"
        ) from error


def load_meta_model(model: str) -> nn.Module:
    """The full model of MODEL on the meta device: shapes, no memory.

    Raises: as :func:`load_config`; CommandError when transformers
        can make no model of the config.
    """
    return make_meta_model(load_config(model), model)


def make_meta_model(config: PretrainedConfig, said: str) -> nn.Module:
    """The full model of a config of any family on the meta device; ``said`` is what the user calls it.

    Raises: CommandError when transformers can make no model of it, or one of too many layers.
    """
    layers = getattr(config, "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise CommandError(f"The config of {said} has {layers} layers, more than {MAX_LAYERS}.")
    try:
        return meta_model(config)
    except SDPConfigError:
        raise
    except Exception as error:  # negative sizes, heads that do not divide, ...: whatever the layers say
        raise CommandError(f"No model can be made of the config of {said}: {first_line(error)}") from error


@contextlib.contextmanager
def running(said: str) -> Iterator[None]:
    """For what runs the model of a config that could be made: heads that do not fit each other show only then.

    Raises: CommandError with what the layers say.
    """
    try:
        yield
    except SDPConfigError:
        raise
    except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
        raise CommandError(f"A step of the model of {said} cannot be computed: {first_line(error)}") from error


def short_text(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


def first_line(error: Exception) -> str:
    """What the error says, in one line (and the next after a colon); its class if it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]) if lines else type(error).__name__
