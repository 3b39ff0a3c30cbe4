"""Records what lives while a model runs: bytes that come to stay, the most at once, FLOPs, gradients of parameters.

A dispatch mode sees every storage come and go; hooks mark the moments at which FSDP2's hooks run.
Source: torch/distributed/_tools/mem_tracker.py (storages by weak reference), torch/utils/flop_counter.py.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import flop_registry

from ..compat import TorchDispatchMode, tree_flatten, tree_leaves, tree_unflatten
from ..families.values import without_values
from .convolutions import most_within

_aten = torch.ops.aten


@dataclass
class Segment:
    """Between two marks.

    Attributes:
        delta: bytes that live after it, less those before it; gradients of parameters left out.
        peak: the most bytes that live within it, less those before it; with the gradients of this segment.
        flops: of matrix products and attention.
        gradients: local parameter name -> bytes of its gradient, which comes to be in this segment.
    """

    delta: int = 0
    peak: int = 0
    flops: int = 0
    gradients: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Mark:
    """``kind``: pre_forward, post_forward, pre_backward (the gradient of the output is there) or post_backward (that of
    the inputs is there): the moments at which FSDP2's hooks run. Of the whole step also end_of_forward, and end (of
    backward). ``module``: its local name."""

    kind: str
    module: str


class Recorder(TorchDispatchMode):
    """Sees every storage come and go. ``stream``: segments and marks so far."""

    def __init__(self, not_counted: list[torch.Tensor]):
        super().__init__()
        self.stream: list[Segment | Mark] = []
        self._ignored = {t.untyped_storage()._cdata for t in not_counted}
        self._alive: dict[int, tuple[weakref.ref, int]] = {}
        self._live = 0
        self._segment, self._before = Segment(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = without_values(func, args, kwargs)
        self._segment.flops += _flops(func, args, kwargs, out)
        self._note(most_within(func, args, out))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive or key in self._ignored:
            return
        nbytes = storage.nbytes()
        self._alive[key] = (weakref.ref(storage, lambda _: self._freed(key)), nbytes)
        self._live += nbytes
        self._note()

    def _note(self, further: int = 0) -> None:
        here = self._live + further - self._before + sum(self._segment.gradients.values())
        self._segment.peak = max(self._segment.peak, here)

    def _freed(self, key: int) -> None:
        self._live -= self._alive.pop(key)[1]

    def gradient(self, name: str, parameter: nn.Parameter) -> None:
        """The gradient of a parameter is complete: from here on the sharding engine's."""
        assert parameter.grad is not None  # the hook that calls this runs when it is there
        nbytes = self._alive.pop(parameter.grad.untyped_storage()._cdata)[1]
        self._live -= nbytes
        self._segment.gradients[name] = nbytes
        parameter.grad = None

    def mark(self, kind: str, module: str) -> None:
        self._segment.delta = self._live - self._before
        if self._segment != Segment():
            self.stream.append(self._segment)
        self.stream.append(Mark(kind, module))
        self._segment, self._before = Segment(), self._live


def watch(model: nn.Module, modules: Iterable[str], recorder: Recorder) -> None:
    """Hooks at the modules of these names, as FSDP2 places them (``_fsdp_state.py``)."""
    for name in modules:
        _watch_module(model.get_submodule(name), name, recorder)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: recorder.gradient(name, p))


def _watch_module(module: nn.Module, name: str, recorder: Recorder) -> None:
    def before(_, args, kwargs):
        recorder.mark("pre_forward", name)
        leaves, spec = tree_flatten((args, kwargs))
        learned = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and leaf.requires_grad]
        if learned and torch.is_grad_enabled():
            watched = _MarkBackward.apply(recorder, name, *(leaves[i] for i in learned))
            for i, tensor in zip(learned, watched, strict=True):
                leaves[i] = tensor
        return tree_unflatten(leaves, spec)

    def after(_, args, output):
        recorder.mark("post_forward", name)
        for tensor in tree_leaves(output if isinstance(output, torch.Tensor | tuple) else list(output.values())):
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(lambda grad: recorder.mark("pre_backward", name))

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


class _MarkBackward(torch.autograd.Function):
    """The inputs as they are; marks when their gradients are there. Source: FSDP2's RegisterPostBackwardFunction."""

    @staticmethod
    def forward(ctx, recorder: Recorder, name: str, *inputs: torch.Tensor):
        ctx.recorder, ctx.name = recorder, name
        return inputs

    @staticmethod
    def backward(ctx, *grads):
        ctx.recorder.mark("post_backward", ctx.name)
        return None, None, *grads


def _flops(func, args, kwargs, out) -> int:
    """Multiplications and additions of matrix products. Attention: all scores are counted, as if it were not causal."""
    packet = func.overloadpacket
    if packet in (
        _aten._scaled_dot_product_flash_attention_for_cpu,
        _aten._scaled_dot_product_flash_attention_for_cpu_backward,
    ):
        backward = packet is _aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key = args[1:3] if backward else args[:2]
        product = 2 * query.shape[:-1].numel() * key.shape[-2] * query.shape[-1]
        return product * (5 if backward else 2)  # backward computes the scores again
    formula = flop_registry.get(packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)
