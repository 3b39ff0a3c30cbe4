"""Memory that convolutions take for a moment, on a CPU.

oneDNN computes in its own layout, in which channels come in packs of 16. PyTorch copies inputs and outputs into it and
back (aten/src/ATen/native/mkldnn/Conv.cpp). Where an image has few pixels, or a layer many channels, the copies of the
weights are much of what a step takes.
"""

import torch

_aten = torch.ops.aten
_PACK = 16
_IMAGE_CHANNELS = 3
"""The input of the first convolution is read as it is."""


def most_within(func, args: tuple, out) -> int:
    """The most bytes at once that a call allocates, its results among them; 0 of anything but a convolution."""
    packet = func.overloadpacket
    if packet is _aten.convolution:
        x, weight = args[:2]
        return max(_input(x) + _weight(weight) + _copy(out), _copy(out) + out.nbytes)
    if packet is not _aten.convolution_backward:
        return 0
    of_output, x, weight = args[:3]
    of_input, of_weight, _ = out
    kept = sum(operand.nbytes for operand in (of_output, x, weight) if not operand.is_contiguous())
    found = [kept]
    if of_input is not None:
        found += [kept + _copy(of_output) + _weight(weight) + _copy(x), kept + _copy(x) + of_input.nbytes]
        kept += of_input.nbytes
    if of_weight is not None:
        kept += _weight(weight)
        operands = 0 if weight.shape[1] == 1 else _copy(of_output) + _input(x)  # a depthwise one reads them as they are
        found += [kept + operands, kept + of_weight.nbytes]
    return max(found)


def _input(x: torch.Tensor) -> int:
    return 0 if x.shape[1] <= _IMAGE_CHANNELS else _copy(x)


def _copy(x: torch.Tensor) -> int:
    """Of a tensor with channels at dim 1."""
    return x.nbytes // x.shape[1] * _rounded(x.shape[1])


def _weight(weight: torch.Tensor) -> int:
    rows, columns = weight.shape[:2]
    if columns <= _IMAGE_CHANNELS:  # also of a depthwise convolution
        return weight.nbytes // rows * _rounded(rows)
    return weight.nbytes // (rows * columns) * _rounded(rows) * _rounded(columns)


def _rounded(channels: int) -> int:
    return -(-channels // _PACK) * _PACK
