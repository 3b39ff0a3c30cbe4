"""Where a model family keeps its residual blocks, and how their kinds are cut. One file for families of one structure.

Everything else is derived from the model's tensor-parallel plan (``config.base_model_tp_plan``).
"""

from ..errors import SDPConfigError
from .base import Block, Family, Stack
from .pre_norm import MODEL_TYPES, PRE_NORM

FAMILIES: dict[str, Family] = dict.fromkeys(MODEL_TYPES, PRE_NORM)


def family_of(model_config) -> Family:
    """The family of a transformers config. Raises SDPConfigError for an unknown ``model_type``."""
    model_type = getattr(model_config, "model_type", None)
    if model_type not in FAMILIES:
        raise SDPConfigError(
            f"Unknown model family: model_type={model_type!r} ({type(model_config).__name__}). "
            f"Supported: {sorted(FAMILIES)}. A family is one small file in hf_sdp/families/."
        )
    return FAMILIES[model_type]


__all__ = ["FAMILIES", "Block", "Family", "Stack", "family_of"]
