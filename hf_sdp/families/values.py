"""Answers for a model that asks for values on the meta device, where there are none: those of an unpadded batch."""

import functools
import math
from typing import Any

import torch
import torch.fx.experimental._config as meta_config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten

KNOWN_SIZES = functools.partial(meta_config.patch, meta_nonzero_assume_all_nonzero=True)  # type: ignore[attr-defined]
"""What is chosen by a mask is all there is."""


class PythonOfValues(TorchFunctionMode):
    """What Python asks of values. Experts may be called by them (``self[f"expert_{index}"]``): all are the first. Nor
    is any token in a batch (``pad_token_id in input_ids``)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__contains__ and args[0].is_meta:
            return False
        if func is torch.Tensor.__format__ and args[0].is_meta:
            return format(0, *args[1:])
        return func(*args, **(kwargs or {}))


class WithoutValues(TorchDispatchMode):
    """Operations that ask for a value on the meta device get one."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return without_values(func, args, kwargs or {})


def without_values(func, args: tuple, kwargs: dict[str, Any]):
    """The result of an operation; where it is made of values, that of ones."""
    first = args[0] if args else None
    if isinstance(first, torch.Tensor) and first.is_meta:
        if func is _aten._local_scalar_dense.default:
            return {torch.bool: True}.get(first.dtype, 1.0 if first.is_floating_point() else 1)
        if func is _aten.equal.default:
            return True
        if func is _aten.nonzero.default:
            return torch.empty(first.numel(), first.dim(), dtype=torch.long, device="meta")
        if func is _aten.masked_select.default:
            numel = math.prod(torch.broadcast_shapes(first.shape, args[1].shape))
            return torch.empty(numel, dtype=first.dtype, device="meta")
        if func is _aten.unique_consecutive.default:
            return first.new_empty(1), *(first.new_empty(0, dtype=torch.long) for _ in range(2))
    return func(*args, **kwargs)
