"""How attention is computed, chosen for all of a model."""

from transformers import PreTrainedModel


def set_attention(model: PreTrainedModel, implementation: str) -> None:
    """Also of the stacks that have a copy of the model's config (T5), which transformers before 5.23 leaves out.

    Raises: ValueError when the class of the model has its own attention.
    """
    model.set_attn_implementation(implementation)
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and type(module.config) is type(model.config):
            module.set_attn_implementation(implementation)
