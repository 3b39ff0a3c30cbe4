"""``Setting``: what all runs of one comparison have in common."""

import dataclasses
import platform
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

from ...errors import SDPConfigError
from ..small_llama import small_llama
from .baselines import narrowed


@dataclass(frozen=True, kw_only=True)
class Setting(ABC):
    """Schedule of a comparison, and what its models are made of; the data come with the Trainer of a run.

    Attributes:
        batch: rows (sequences, images) of a worker's micro-batch: ``workers * batch`` rows a step, for every method.
        workers: virtual workers N; micro-batch k of the N of a step is worker k's.
        steps: optimizer steps of data parallel.
        equal: "flops": every method gets as many steps as cost what data parallel costs; "steps": the same number.
        learning_rate: peak of every run, after a warm-up of 5% of the run's own length.
        schedule: "stable": constant until the last 20%, then linearly to zero (a budget in which the loss still falls
            steeply is not spent at low rates); "cosine": to zero.
        evaluations: of the full model, evenly over a run, the last one at its end.
    Raises: SDPConfigError for a value out of range.
    """

    batch: int = 1
    workers: int = 8
    steps: int = 200
    equal: str = "flops"
    learning_rate: float = 4e-3
    schedule: str = "stable"
    evaluations: int = 5

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float) and not value > 0:
                raise SDPConfigError(f"{field.name} must be positive, got {value}.")
        for name, allowed in {"equal": ("flops", "steps"), "schedule": ("stable", "cosine")}.items():
            if getattr(self, name) not in allowed:
                raise SDPConfigError(f"{name} must be one of {allowed}, got {getattr(self, name)!r}.")
        if self.steps % self.evaluations:
            raise SDPConfigError(
                f"steps={self.steps} must be a multiple of evaluations={self.evaluations}: the last evaluation is at "
                f"the end. Nearest: {max(1, round(self.steps / self.evaluations)) * self.evaluations}."
            )

    @abstractmethod
    def model_config(self) -> PreTrainedConfig: ...

    @abstractmethod
    def make_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        """With random weights."""

    @abstractmethod
    def narrowed(self, coverage: float) -> PreTrainedConfig:
        """The config of a homogeneous model with as many parameters as a subnetwork of this coverage.

        Raises: SDPConfigError when there is none.
        """

    @abstractmethod
    def example(self) -> dict[str, torch.Tensor]:
        """Arguments of a model with the shapes of a worker's micro-batch; for counting FLOPs."""


@dataclass(frozen=True, kw_only=True)
class TextSetting(Setting):
    """A Llama on text; the defaults are those of examples/quality.

    Attributes:
        hidden_size ... initializer_range: by the names of ``LlamaConfig``.
        sequence: tokens of a sequence, which is a row.
        eval_sequences: held-out sequences that one evaluation reads.
        text: which text it is (see :func:`text_name`).
    """

    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    vocab_size: int = 512
    initializer_range: float = 0.08
    sequence: int = 128
    eval_sequences: int = 128
    text: str = ""

    def __post_init__(self):
        super().__post_init__()
        if self.hidden_size % (2 * self.num_attention_heads) or self.num_attention_heads % self.num_key_value_heads:
            raise SDPConfigError(
                f"hidden_size={self.hidden_size} must be a multiple of twice num_attention_heads="
                f"{self.num_attention_heads} (rotary embeddings), and that one of num_key_value_heads="
                f"{self.num_key_value_heads}."
            )

    def model_config(self) -> LlamaConfig:
        return small_llama(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            initializer_range=self.initializer_range,
            max_position_embeddings=self.sequence,
        )

    def make_model(self, config: PreTrainedConfig) -> PreTrainedModel:
        return LlamaForCausalLM(config)

    def narrowed(self, coverage: float) -> PreTrainedConfig:
        return narrowed(self.model_config(), coverage, self.workers)

    def example(self) -> dict[str, torch.Tensor]:
        ids = torch.zeros(self.batch, self.sequence, dtype=torch.long)
        return {"input_ids": ids, "labels": ids}


def text_name(text_file: str | Path | None) -> str:
    """How a setting names its text: runs on another one are not comparable."""
    if text_file is None:
        return f"standard library of Python {platform.python_version()}"
    return f"{Path(text_file).name}, {Path(text_file).stat().st_size} bytes"
