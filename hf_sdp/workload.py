"""``Workload``: what a worker computes in a step, as far as memory and time depend on it."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from . import options
from .errors import SDPConfigError
from .options import option

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Name -> bytes of an element."""
SHORT_DTYPES: dict[str, Dtype] = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
Optimizer = Literal["adamw", "adam", "sgd-momentum", "sgd"]
OPTIMIZER_STATES: dict[Optimizer, int] = {"adamw": 2, "adam": 2, "sgd-momentum": 1, "sgd": 0}
"""Name -> tensors of the parameter's shape and dtype that the optimizer keeps for it."""

MOST = 2**20
"""Sequences of a micro-batch, and tokens of a sequence. Bytes of any tensor then fit into 64 bits."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One worker's micro-batch and number formats. The short names of dtypes ("bf16") are understood as well.

    Raises: SDPConfigError for a value out of range.
    """

    batch: int = option("Sequences of a worker's micro-batch.", positive=True, most=MOST)
    sequence: int = option("Tokens of a sequence, of an encoder and of a decoder alike.", positive=True, most=MOST)
    dtype: Dtype = option("Number format of computation, activations and gathered parameters.", default="float32")
    param_dtype: Dtype = option("Number format of stored parameters, gradients and optimizer state.", default="float32")
    frozen_dtype: Dtype | None = option(
        "Number format of stored parameters that do not learn (under LoRA adapters); by default as the others.",
        default=None,
    )
    optimizer: Optimizer = option("Decides how many tensors of state a parameter has.", default="adamw")
    gradient_checkpointing: bool = option("Decoder layers are recomputed in backward.", default=False)

    def __post_init__(self):
        for name in ("dtype", "param_dtype", "frozen_dtype"):
            value = getattr(self, name)
            if isinstance(value, str):
                object.__setattr__(self, name, SHORT_DTYPES.get(value, value))
        options.check(self)

    @property
    def dtype_of_frozen(self) -> Dtype:
        return self.frozen_dtype or self.param_dtype

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.batch * self.sequence

    @classmethod
    def parse(cls, text: str) -> "Workload":
        """From ``"batch=4,sequence=1024,dtype=bfloat16"``. Raises: SDPConfigError naming what is not understood."""
        fields = dataclasses.fields(cls)
        values = options.parse_all(fields, text, what="workload", example="batch=4,sequence=1024")
        missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in values]
        if missing:
            raise SDPConfigError(f"workload {text!r} lacks {missing}. Write it as batch=4,sequence=1024.")
        return cls(**values)
