"""Tiny models and data, the same in every process."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_sdp.bench.small_llama import small_llama
from hf_sdp.bench.support import models as support
from hf_sdp.bench.support.tiny import tiny_config as support_config

VOCAB = 64  # of small_llama
SMALL = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_attention_heads=8, use_cache=False)
"""Sizes for ``tiny_config`` whose memory is more than what an allocator rounds up."""


WITHOUT_DROPOUT = dict(attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0, mlp_dropout=0.0)

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
)  # fmt: skip


def tiny_config(model_type: str = "llama", **overrides) -> PreTrainedConfig:
    """Of any model type whose config has the usual names; overrides that it has not are left out."""
    llama = small_llama(**{**dict(num_key_value_heads=4, max_position_embeddings=64, use_cache=True), **overrides})
    if model_type == "llama":
        return llama
    sizes = {name: getattr(llama, name) for name in SIZES} | WITHOUT_DROPOUT | overrides
    known = CONFIG_MAPPING[model_type]()
    return CONFIG_MAPPING[model_type](**{name: value for name, value in sizes.items() if hasattr(known, name)})


def tiny_model(
    seed: int = 0, task: str | None = None, lora: dict | None = None, quantized: dict | None = None, **overrides
) -> PreTrainedModel:
    """``task``: of any model type, with the sizes of ``hf_sdp.bench.support`` (a key of its ``TASKS``).

    ``lora``: options of adapters, none of which is zero. ``quantized``: of its BitsAndBytesConfig.
    """
    if lora is not None:
        return with_adapters(tiny_model(seed, task, quantized=quantized, **overrides), **lora)
    if quantized is not None:
        return with_four_bits(tiny_model(seed, task, **overrides), **quantized)
    if task is not None:
        return support.tiny_model(support_config(**overrides), task, seed)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(**overrides)).train()
    with torch.no_grad():  # norms and biases that are not all alike, so that a mix-up shows
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(0.1 * torch.randn(p.shape))
    return model


def batch(index: int, size: int = 2, length: int = 16) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, VOCAB, (size, length), generator=torch.Generator().manual_seed(1000 + index))
    return {"input_ids": ids, "labels": ids}


def with_adapters(model: PreTrainedModel, **options):
    """A model of PEFT. ``options``: of its LoraConfig."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(**{**dict(r=4, lora_alpha=8, target_modules="all-linear"), **options}))
    with torch.no_grad():  # B is zero else, and A learns nothing
        for name, p in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                p.copy_(0.1 * torch.randn(p.shape))
    return model


def with_four_bits(model: PreTrainedModel, **options) -> PreTrainedModel:
    """The same model, loaded with its linear layers in four bits. ``options``: of its BitsAndBytesConfig."""
    from transformers import BitsAndBytesConfig

    four_bits = dict(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16, bnb_4bit_compute_dtype=torch.float32)
    loaded = dict(config=model.config, state_dict=model.state_dict())
    quantization = BitsAndBytesConfig(**four_bits | options)
    return type(model).from_pretrained(None, quantization_config=quantization, **loaded).train()


def batch_for(model: PreTrainedModel, index: int, task: str | None = None) -> dict[str, torch.Tensor]:
    """``task``: of which :func:`tiny_model` has made the model."""
    return batch(index) if task is None else support.tiny_batch(model, index, task=task)
