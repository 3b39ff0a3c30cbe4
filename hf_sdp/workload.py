"""``Workload``: what a worker computes in a step, as far as memory and time depend on it."""

import dataclasses
from dataclasses import dataclass

from .errors import SDPConfigError

DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Name -> bytes of an element."""
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
OPTIMIZER_STATES = {"adamw": 2, "adam": 2, "sgd-momentum": 1, "sgd": 0}
"""Name -> tensors of the parameter's shape and dtype that the optimizer keeps for it."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One worker's micro-batch and number formats.

    Attributes:
        batch, sequence: sequences of a micro-batch and tokens of each.
        dtype: of computation, activations and gathered parameters ("bf16" etc. are understood).
        param_dtype: of stored parameters, gradients and optimizer state.
        optimizer: one of ``OPTIMIZER_STATES``.
        gradient_checkpointing: decoder layers are recomputed in backward.
    Raises: SDPConfigError for a value out of range.
    """

    batch: int
    sequence: int
    dtype: str = "float32"
    param_dtype: str = "float32"
    optimizer: str = "adamw"
    gradient_checkpointing: bool = False

    def __post_init__(self):
        for name in ("batch", "sequence"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SDPConfigError(f"{name} must be a positive integer, got {value!r}.")
        for name in ("dtype", "param_dtype"):
            value = SHORT_DTYPES.get(getattr(self, name), getattr(self, name))
            if value not in DTYPES:
                raise SDPConfigError(f"{name} must be one of {[*DTYPES, *SHORT_DTYPES]}, got {value!r}.")
            object.__setattr__(self, name, value)
        if self.optimizer not in OPTIMIZER_STATES:
            raise SDPConfigError(f"optimizer must be one of {list(OPTIMIZER_STATES)}, got {self.optimizer!r}.")
        if not isinstance(self.gradient_checkpointing, bool):
            raise SDPConfigError(f"gradient_checkpointing must be True or False, got {self.gradient_checkpointing!r}.")

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch * self.sequence

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """From ``"batch=4,sequence=1024,dtype=bfloat16"``. Raises: SDPConfigError naming what is not understood."""
        types = {f.name: f.type for f in dataclasses.fields(cls)}
        read = {int: int, str: str, bool: lambda value: {"true": True, "false": False}[value.lower()]}
        values = {}
        for item in text.split(","):
            name, _, value = (piece.strip() for piece in item.partition("="))
            try:
                values[name] = read[types[name]](value)
            except (KeyError, ValueError):
                raise SDPConfigError(
                    f"workload={text!r}: {item.strip()!r} is not understood. Write it as 'batch=4,sequence=1024' with any of "
                    f"{list(types)}."
                ) from None
        missing = {"batch", "sequence"} - values.keys()
        if missing:
            raise SDPConfigError(f"workload={text!r} lacks {sorted(missing)}.")
        return cls(**values)
