"""Simulation of all virtual workers at once: a micro-batch has the rows of every worker, worker by worker.

It is ``simulation.py`` with N times fewer calls, for what it can do (:func:`can_be_stacked`): the k-th of N equal parts
of the rows is worker k's micro-batch, and the mean loss over all rows has the gradient of an accumulation window. The
model stays whole, its Parameters stay, and a later call of :func:`stack` exchanges the plan.
"""

from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from transformers import LlamaForCausalLM

from ..plan.plan import Plan
from ..plan.units import MaskableModule
from .held_blocks import ScaledGradient, exchanged
from .held_ranges import HeldRanges, held_ranges
from .mixin import mix_in


def can_be_stacked(model: nn.Module, plan: Plan) -> bool:
    """A Llama without a key/value cache; of a module that is cut every subnetwork must hold as much."""
    if not isinstance(model, LlamaForCausalLM) or model.config.use_cache:
        return False
    if plan.level == "block":
        return all(module.members[-1] == module.name for module in plan.modules)
    return plan.masking == "backward" or all(
        len({len(plan.held_units(module, k)) for k in range(plan.num_subnetworks)}) == 1 for module in plan.modules
    )


def stack(model: nn.Module, plan: Plan) -> None:
    """From now on the model trains all subnetworks of ``plan``, in place of what it was stacked for before.

    In eval mode it is the full model. ``plan``: one with which it can be stacked. Indices are put where the weights
    are: whoever moves the model stacks it again.
    """
    for stacked in _stacked_modules(model):
        stacked.__class__ = type(stacked).__bases__[-1]  # what mix_in found
    held = held_ranges(plan, range(plan.num_subnetworks))
    with next(model.parameters()).device:
        for module in plan.modules:
            if plan.is_shared(module):
                continue
            if plan.level == "block":
                _stack_block(model, plan, module)
            else:
                _stack_neurons(model, plan, module, held)


def is_stacked(model: nn.Module) -> bool:
    """Whether its training forward takes the rows of all workers."""
    return bool(_stacked_modules(model))


def _stacked_modules(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, StackedModule)]


class StackedModule(nn.Module):
    """Mixed into the class of a module that computes for all workers at once in training."""


class _GatheredRows(torch.autograd.Function):
    """Of ``tensor`` (rows, ...) the rows that each worker holds: (workers, held rows, ...).

    A row's gradient is the sum over its holders, multiplied by ``scales`` (N/r for each of ``index``).
    """

    @staticmethod
    def forward(ctx, tensor, index, scales):
        ctx.shape = tensor.shape
        ctx.save_for_backward(index, scales)
        return tensor.index_select(0, index.flatten()).unflatten(0, index.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        index, scales = ctx.saved_tensors
        scaled = (grad * scales.view(*scales.shape, *[1] * (grad.dim() - 2))).flatten(0, 1)
        return grad.new_zeros(ctx.shape).index_add_(0, index.flatten(), scaled), None, None


class StackedLinear(StackedModule):
    """A linear layer of which worker k has the held part only: one product of stacked matrices.

    Attributes:
        dim: 0 for column-wise layers (rows of ``weight``), 1 for row-wise ones.
        index, scales: of each worker the indices along ``dim`` that it holds, and N/r: (workers, held).
    """

    dim: int
    index: torch.Tensor
    scales: torch.Tensor
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        by_worker = x.reshape(len(self.index), -1, x.shape[-1])
        if self.dim == 0:
            output = by_worker @ _GatheredRows.apply(self.weight, self.index, self.scales).transpose(1, 2)
        else:
            output = by_worker @ _GatheredRows.apply(self.weight.t(), self.index, self.scales)
        if self.bias is not None:
            cut = self.dim == 0  # the bias of a row-wise layer is shared
            output = output + (
                _GatheredRows.apply(self.bias, self.index, self.scales).unsqueeze(1) if cut else self.bias
            )
        return output.view(*x.shape[:-1], -1)


Learned = list[tuple[torch.Tensor, tuple[tuple[int, int], ...], float]]
"""For each part of a layer: its holders, its ranges along the cut dim, and N/r."""


class _LearnsByPart(torch.autograd.Function):
    """``x (..., in), weight (out, in) -> (..., out)``; a part of ``weight`` learns from the rows of its holders."""

    @staticmethod
    def forward(ctx, x, weight, bias, dim: int, learned: Learned, workers: int):
        ctx.dim, ctx.learned, ctx.workers, ctx.has_bias = dim, learned, workers, bias is not None
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        grad_weight, grad_bias = torch.zeros_like(weight), None
        inputs, outputs = (t.reshape(ctx.workers, -1, t.shape[-1]) for t in (x, grad_output))
        if ctx.has_bias:
            grad_bias = torch.zeros_like(weight[:, 0]) if ctx.dim == 0 else outputs.sum((0, 1))
        for holders, ranges, scale in ctx.learned:
            of_holders = [t.index_select(0, holders).flatten(0, 1) for t in (inputs, outputs)]
            for start, stop in ranges:
                i, o = of_holders
                if ctx.dim == 0:
                    o = o[:, start:stop]
                    if grad_bias is not None:
                        grad_bias[start:stop] = o.sum(0) * scale
                else:
                    i = i[:, start:stop]
                grad_weight.narrow(ctx.dim, start, stop - start).copy_(o.t() @ i * scale)
        return grad_output @ weight, grad_weight, grad_bias, None, None, None


class StackedLearner(StackedModule):
    """A full linear layer, each part of which learns from its holders alone (backward masking)."""

    dim: int
    learned: Learned
    workers: int
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(x)
        return _LearnsByPart.apply(x, self.weight, self.bias, self.dim, self.learned, self.workers)


class OfHolders(StackedModule):
    """A member of a residual block that learns from the rows of its holders alone.

    Attributes:
        holders, others: the workers that hold it, and those that do not.
        scale: N/r.
    """

    holders: torch.Tensor
    others: torch.Tensor
    scale: float

    def rows(self, workers: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Numbers of the rows of some workers, of ``num_rows`` in all."""
        by_worker = torch.arange(num_rows, device=workers.device).view(len(self.holders) + len(self.others), -1)
        return by_worker[workers].flatten()


def _picked(arguments, rows: torch.Tensor, num_rows: int):
    """Of every tensor that has something for each row that of ``rows``."""

    def pick(t: torch.Tensor) -> torch.Tensor:
        return t.index_select(0, rows) if t.dim() > 2 and t.shape[0] == num_rows else t

    return tree_map_only(torch.Tensor, pick, arguments)


def _put(output, rows: torch.Tensor, num_rows: int):
    """Every tensor at ``rows`` among zeros."""

    def put(t: torch.Tensor) -> torch.Tensor:
        return t.new_zeros(num_rows, *t.shape[1:]).index_copy(0, rows, t)

    return tree_map_only(torch.Tensor, put, output)


class NormOfHolders(OfHolders):
    """The norm of a block, forward masking. It computes on all rows: its module reads those of the holders.

    All gradients within the block are N/r times as large (``BranchOfHolders``), until here.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.training:
            hidden_states = ScaledGradient.apply(hidden_states, 1 / self.scale)
        return super().forward(hidden_states)


class BranchOfHolders(OfHolders):
    """The module of a block, forward masking: of rows of workers that do not hold it, it adds zero to the stream."""

    def forward(self, *args, **kwargs):
        if not self.training:
            return super().forward(*args, **kwargs)
        num_rows = tree_leaves((args, kwargs))[0].shape[0]
        rows = self.rows(self.holders, num_rows)
        args, kwargs = _picked((args, kwargs), rows, num_rows)
        output = _put(super().forward(*args, **kwargs), rows, num_rows)
        return tree_map_only(torch.Tensor, lambda t: ScaledGradient.apply(t, self.scale), output)


class LearnsFromHolders(OfHolders):
    """A member of a block, backward masking: it computes on all rows."""

    def forward(self, *args, **kwargs):
        if not self.training:
            return super().forward(*args, **kwargs)
        num_rows = tree_leaves((args, kwargs))[0].shape[0]
        exchanges = ((self.holders, lambda p: ScaledGradient.apply(p, self.scale)), (self.others, torch.Tensor.detach))
        outputs = []
        for workers, other in exchanges:
            rows = self.rows(workers, num_rows)
            of_rows, named = _picked((args, kwargs), rows, num_rows)
            with exchanged(self, other):
                outputs.append(_put(super().forward(*of_rows, **named), rows, num_rows))
        return tree_map(lambda a, b: None if a is None else a + b, *outputs)


def _stack_block(model: nn.Module, plan: Plan, module: MaskableModule) -> None:
    (holders,) = plan.unit_holders[module.name]
    for name in module.members:
        member = model.get_submodule(name)
        if plan.masking == "backward":
            mix_in(member, LearnsFromHolders)
        else:
            mix_in(member, BranchOfHolders if name == module.name else NormOfHolders)
        stacked = cast(OfHolders, member)
        stacked.holders = torch.tensor(holders)
        stacked.others = torch.tensor([k for k in range(plan.num_subnetworks) if k not in holders])
        stacked.scale = plan.gradient_scale(holders)


def _stack_neurons(
    model: nn.Module, plan: Plan, module: MaskableModule, held: dict[str, dict[int, HeldRanges]]
) -> None:
    for owner, dims in module.by_owner.items():
        linear, name = model.get_submodule(owner), f"{owner}.weight"
        if plan.masking == "forward":
            mix_in(linear, StackedLinear)
            stacked = cast(StackedLinear, linear)
            by_worker = [held[name][k] for k in range(plan.num_subnetworks)]
            index = [[i for start, stop, _ in ranges for i in range(start, stop)] for ranges in by_worker]
            scales = [[scale for start, stop, scale in ranges for _ in range(start, stop)] for ranges in by_worker]
            stacked.index, stacked.scales = torch.tensor(index), torch.tensor(scales)
            stacked.dim = dims["weight"]
        else:
            mix_in(linear, StackedLearner)
            learner = cast(StackedLearner, linear)
            learner.dim, learner.workers = dims["weight"], plan.num_subnetworks
            learner.learned = [
                (torch.tensor(p.holders), p.regions[name].ranges[learner.dim], plan.gradient_scale(p.holders))
                for p in plan.parts
                if p.module == module
            ]
