"""Autocast does not look into autograd functions."""

import torch


def autocast(*tensors):
    """What autocast would do to the operands of a linear layer; the first one is its input."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):  # not on meta
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t is not None and t.dtype.is_floating_point else t for t in tensors)
