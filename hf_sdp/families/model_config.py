"""What a transformers config says about a model, and how two of them differ.

Keys that every config has (those of ``PreTrainedConfig``) say how a model is called, named and saved; they never count.
"""

import json
from typing import Any

from transformers import PreTrainedConfig

_NO_FUNCTION = {"initializer_range", "use_cache"}
_NO_FUNCTION_ENDS = ("_token_id", "dropout")


def architecture(config: PreTrainedConfig) -> dict[str, Any]:
    """All values that are the model's own, by path (``rope_parameters.rope_theta``)."""
    common = PreTrainedConfig().to_dict().keys()
    return _flat({key: value for key, value in config.to_dict().items() if key not in common})


def config_key(config: PreTrainedConfig) -> str:
    """Equal for equal configs."""
    return json.dumps(config.to_dict(), sort_keys=True, default=str)


def differences(config: PreTrainedConfig, saved: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Path -> value of ``saved`` (the content of a config.json) and of ``config``, where they make different models.

    That is: with the same weights they would compute something else in evaluation. What speaks of initialization, the
    cache, token ids or dropout does not count, nor what the class of ``config`` does not know.
    """
    if saved.get("model_type") != config.model_type:
        return {"model_type": (saved.get("model_type"), config.model_type)}
    kind = type(config)
    known = kind().to_dict().keys() - _NO_FUNCTION
    # Read by the same class: what a file leaves out is its default, and old names have become new ones.
    then, now = (
        {
            path: value
            for path, value in architecture(c).items()
            if path.split(".")[0] in known and not path.endswith(_NO_FUNCTION_ENDS)
        }
        for c in (kind.from_dict(saved), config)
    )
    return {path: (then.get(path), now.get(path)) for path in {**then, **now} if then.get(path) != now.get(path)}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return result
