"""Running statistics of batch norms: buffers that training changes.

Every worker has them in full, under their standard names, whatever it holds; a norm that is held in part uses and
updates its ranges of them. So evaluation, checkpoints and whoever lists buffers need not know of holders. They differ
between workers until they are averaged over their holders (``engine/statistics.py``). Batch norm updates them linearly:
to average them when they are read is to average them in every step.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from ..config import SDPConfig
from ..errors import SDPConfigError
from ..families.layers import STATISTICS, has_statistics
from ..plan.plan import Plan
from ..plan.region import Ranges
from .mixin import mix_in
from .state import Cursor


def batch_norms(model: nn.Module) -> dict[str, Any]:
    """Those with running statistics, by name."""
    return {name: module for name, module in model.named_modules() if has_statistics(module)}


def refuse_cast_norms(model: nn.Module, param_dtype: str | None) -> None:
    """Raises SDPConfigError for a norm whose weights would be gathered in another dtype than its statistics are of:
    batch norm wants one."""
    for name, norm in batch_norms(model).items():
        dtype = str(norm.running_mean.dtype).removeprefix("torch.")
        if param_dtype not in (None, dtype):
            raise SDPConfigError(
                f"param_dtype={param_dtype!r}: {name} is a batch norm, whose running statistics are {dtype}. Use "
                "TrainingArguments(bf16=True), which computes it in float32."
            )


def refuse_options_of_norms(config: SDPConfig, model_name: str) -> None:
    """Raises SDPConfigError for options that have an effect on batch norms alone: the model has none."""
    for option, default in (("recalibrate_batches", None), ("average_shared_statistics", True)):
        value = getattr(config, option)
        if value != default:
            raise SDPConfigError(
                f"{option}={value} has no effect: {model_name} has no batch norms with running statistics. Leave it "
                "out."
            )


def refuse_synced_norms(model: nn.Module) -> None:
    """Raises SDPConfigError for a norm that communicates in its forward: workers that do not hold it would be waited
    for."""
    for name, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            raise SDPConfigError(
                f"{name} is a SyncBatchNorm: it waits for all workers, and those that do not hold it never come. Use "
                "BatchNorm2d (hf_sdp averages its running statistics over the holders), or masking='backward'."
            )


def holders_of(plan: Plan, name: str, num_features: int) -> torch.Tensor:
    """Which subnetworks update the statistics of a norm: bool of shape ``(N, num_features)``.

    ``name``: of the norm. Where all compute the full forward (backward masking) it is all of them.
    """
    result = torch.ones(plan.num_subnetworks, num_features, dtype=torch.bool)
    if plan.masking == "backward":
        return result
    for module in plan.modules:
        if plan.level == "neuron":
            weight = f"{name}.weight"
            if weight in module.dims:
                for slice_ in plan.slices[weight]:
                    held = [subnetwork in slice_.holders for subnetwork in range(plan.num_subnetworks)]
                    result[:, slice_.start : slice_.stop] = torch.tensor(held).unsqueeze(1)
        elif any(f"{name}.".startswith(f"{member}.") for member in module.members):
            (holders,) = plan.unit_holders[module.name]
            held = [subnetwork in holders for subnetwork in range(plan.num_subnetworks)]
            result &= torch.tensor(held).unsqueeze(1)
    return result


def speakers_of(plan: Plan, name: str, num_features: int, num_workers: int, *, average_shared: bool) -> torch.Tensor:
    """Over which workers the statistics of a norm are averaged: bool of shape ``(num_workers, num_features)``.

    All that hold a feature; without ``average_shared`` the first one alone where all do.
    """
    holders = holders_of(plan, name, num_features)
    speakers = holders.repeat(num_workers // plan.num_subnetworks, 1)
    if not average_shared:
        speakers[1:] &= ~holders.all(0)
    return speakers


class HeldStatistics(nn.Module):
    """Mixed into the class of a batch norm that is held in part: it uses its ranges of the statistics.

    ``sdp_ranges``: of its features, in the order in which they are put together.
    """

    sdp_ranges: Ranges

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._parameters["weight"]
        if weight is not None and len(weight) == len(self.get_buffer("running_mean")):  # the full norm
            return super().forward(x)
        with narrow_statistics(self, self.sdp_ranges):
            return super().forward(x)


def hold_statistics(norm: nn.Module, ranges: Sequence[tuple[int, int]]) -> None:
    """Of a norm whose other tensors are cut to these ranges, in place."""
    mix_in(norm, HeldStatistics)
    vars(norm).update(sdp_ranges=tuple(ranges), num_features=sum(stop - start for start, stop in ranges))


@contextlib.contextmanager
def narrow_statistics(norm: nn.Module, ranges: Ranges) -> Iterator[None]:
    """Within, the statistics of ``norm`` are those of these ranges; what it makes of them is written back."""
    full = {name: cast(torch.Tensor, norm._buffers[name]) for name in STATISTICS}
    for name, tensor in full.items():
        norm._buffers[name] = torch.cat([tensor[start:stop] for start, stop in ranges])
    try:
        yield
    finally:
        sizes = [stop - start for start, stop in ranges]
        for name, tensor in full.items():
            held = cast(torch.Tensor, norm._buffers[name])
            for (start, stop), piece in zip(ranges, held.split(sizes), strict=True):
                tensor[start:stop] = piece
            norm._buffers[name] = tensor


class VirtualStatistics(nn.Module):
    """Mixed into the class of a batch norm that is simulated: each virtual worker has statistics of its own, and those
    of the model are their mean.

    Attributes:
        sdp_speakers: over which workers, as ``speakers_of`` says.
        sdp_ranges: per subnetwork the features that it holds, where it holds some of them.
        sdp_of_workers: name -> what each virtual worker has, shape ``(N, num_features)``, and what they made of it.
    """

    sdp_speakers: torch.Tensor
    sdp_ranges: dict[int, Ranges]
    sdp_of_workers: dict[str, tuple[torch.Tensor, torch.Tensor]]
    cursor: Cursor

    def forward(self, *args, **kwargs):
        if not self.cursor.trains:
            return super().forward(*args, **kwargs)
        own: dict[str, Any] = self._buffers
        models: dict[str, torch.Tensor] = {name: own[name] for name in STATISTICS}
        workers = {name: self._of_workers(name, tensor) for name, tensor in models.items()}
        try:
            current = self.cursor.subnetwork
            for name in STATISTICS:
                own[name] = workers[name][current]
            held = self.sdp_ranges.get(current)
            with contextlib.nullcontext() if held is None else narrow_statistics(self, held):
                return super().forward(*args, **kwargs)
        finally:
            own.update(models)
            for name, tensor in models.items():
                speakers = self.sdp_speakers.to(tensor)
                tensor.copy_((workers[name] * speakers).sum(0) / speakers.sum(0))
                self.sdp_of_workers[name] = workers[name], tensor.clone()

    def _of_workers(self, name: str, current: torch.Tensor) -> torch.Tensor:
        workers, made = self.sdp_of_workers.get(name, (None, None))
        if made is None or not torch.equal(made, current):  # the first forward, or somebody has loaded other ones
            workers = current.expand(len(self.sdp_speakers), -1).clone()
        assert workers is not None
        return workers


def simulate_statistics(model: nn.Module, plan: Plan, cursor: Cursor, *, average_shared: bool) -> None:
    """Of all batch norms, in place. ``average_shared``: as in ``speakers_of``."""
    for name, norm in batch_norms(model).items():
        mix_in(norm, VirtualStatistics)
        virtual = cast(VirtualStatistics, norm)
        virtual.cursor, virtual.sdp_of_workers = cursor, {}
        virtual.sdp_speakers = speakers_of(
            plan, name, len(norm.running_mean), plan.num_subnetworks, average_shared=average_shared
        )
        is_cut = plan.masking == "forward" and plan.level == "neuron" and f"{name}.weight" in plan.cut
        virtual.sdp_ranges = {
            subnetwork: plan.held_region(f"{name}.weight", subnetwork).ranges[0]
            for subnetwork in range(plan.num_subnetworks if is_cut else 0)
        }
