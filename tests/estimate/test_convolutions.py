"""What convolutions take for a moment, against what the allocator sees."""

import pytest
import torch

from hf_sdp.engine.metrics import measured_peak
from hf_sdp.estimate.convolutions import most_within

SHAPES = {
    "3x3": dict(x=(16, 64, 8, 8), weight=(64, 64, 3, 3), stride=1),
    "few pixels": dict(x=(16, 128, 1, 1), weight=(256, 128, 3, 3), stride=1),
    "channels that fill no pack": dict(x=(16, 48, 8, 8), weight=(24, 48, 3, 3), stride=1),
    "downsampling": dict(x=(16, 64, 8, 8), weight=(128, 64, 3, 3), stride=2),
    "of an image": dict(x=(16, 3, 32, 32), weight=(64, 3, 7, 7), stride=2),
    "groups": dict(x=(16, 64, 16, 16), weight=(64, 8, 3, 3), stride=1, groups=8),
    "depthwise": dict(x=(8, 96, 16, 16), weight=(96, 1, 7, 7), stride=1, groups=96),
}


def convolve(x: torch.Tensor, weight: torch.Tensor, stride: int, groups: int):
    """Calls of forward and backward, each as ``(func, args)``."""
    padding = [weight.shape[-1] // 2] * 2
    options = [[stride] * 2, padding, [1, 1], False, [0, 0], groups]
    forward = torch.ops.aten.convolution.default, (x, weight, None, *options)
    output = forward[0](*forward[1])
    learns = [x.shape[1] > 3, True, False]
    backward = torch.ops.aten.convolution_backward.default
    return [forward, (backward, (torch.ones_like(output), x, weight, None, *options, learns))]


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_most_within_is_what_is_allocated(shapes):
    stride, groups = shapes["stride"], shapes.get("groups", 1)
    real = convolve(torch.ones(shapes["x"]), torch.ones(shapes["weight"]), stride, groups)
    meta = convolve(torch.ones(shapes["x"], device="meta"), torch.ones(shapes["weight"], device="meta"), stride, groups)
    for (func, args), (_, on_meta) in zip(real, meta, strict=True):
        func(*args)  # what a first call keeps is no part of it
        with measured_peak(torch.device("cpu")) as peak:
            func(*args)
        assert most_within(func, on_meta, func(*on_meta)) == pytest.approx(peak[0], rel=0.05)


def test_nothing_else_takes_more():
    x = torch.ones(2, 2, device="meta")
    assert most_within(torch.ops.aten.mm.default, (x, x), x) == 0
