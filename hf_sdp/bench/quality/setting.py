"""``Setting``: what all runs of one comparison have in common."""

import dataclasses
import platform
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

from ...errors import SDPConfigError
from ..small_llama import small_llama


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Model shape, data and schedule of a comparison; the defaults are those of examples/quality.

    Attributes:
        hidden_size ... initializer_range: by the names of ``LlamaConfig``.
        sequence, batch: tokens of a sequence, and sequences of a worker's micro-batch: ``workers * batch * sequence``
            tokens a step, for every method.
        workers: virtual workers N; micro-batch k of the N of a step is worker k's.
        steps: optimizer steps of data parallel.
        equal: "flops": every method gets as many steps as cost what data parallel costs; "steps": the same number.
        learning_rate: peak of every run, after a warm-up of 5% of the run's own length.
        schedule: "stable": constant until the last 20%, then linearly to zero (a budget in which the loss still falls
            steeply is not spent at low rates); "cosine": to zero.
        evaluations: of the full model, evenly over a run, the last one at its end.
        eval_sequences: held-out sequences that one evaluation reads.
        text: which text it is (see :func:`text_name`).
    Raises: SDPConfigError for a value out of range.
    """

    hidden_size: int = 64
    intermediate_size: int = 192
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int = 8
    vocab_size: int = 512
    initializer_range: float = 0.08
    sequence: int = 128
    batch: int = 1
    workers: int = 8
    steps: int = 200
    equal: str = "flops"
    learning_rate: float = 4e-3
    schedule: str = "stable"
    evaluations: int = 5
    eval_sequences: int = 128
    text: str = ""

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

    @property
    def tokens_per_step(self) -> int:
        return self.workers * self.batch * self.sequence


def text_name(text_file: str | Path | None) -> str:
    """How a setting names its text: runs on another one are not comparable."""
    if text_file is None:
        return f"standard library of Python {platform.python_version()}"
    return f"{Path(text_file).name}, {Path(text_file).stat().st_size} bytes"
