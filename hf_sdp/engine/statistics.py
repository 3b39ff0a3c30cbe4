"""Running statistics of batch norms: averaged over their holders, and estimated anew for the full model.

DDP takes rank 0's (``broadcast_buffers=True``), and forgets what the others have seen. Here each is the mean over the
workers that hold its feature; over the world where all hold it (``SDPConfig.average_shared_statistics``).
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map

from ..errors import SDPConfigError
from ..families.layers import STATISTICS
from ..model.state import Held, get_state, unwrap
from ..model.statistics import batch_norms, speakers_of
from ..world.agreement import raise_together, together
from .presence import come_to
from .sharded import Sharded, get_sharded


@torch.no_grad()
def average_statistics(model: nn.Module, sharded: Sharded) -> None:
    """Make the running statistics equal on all workers, if training has changed them. Collective.

    Of a feature they become the mean over its holders (``speakers_of``). Two all-reduces, of 16 bytes for each feature.
    """
    if sharded.has_new_statistics and sharded.roll_call is not None:
        sharded.has_new_statistics = False
        norms = batch_norms(unwrap(model))
        _average(norms, {name: _own_share(sharded.held, name, len(norm.running_mean)) for name, norm in norms.items()})


def _own_share(held: Held, name: str, num_features: int) -> torch.Tensor:
    """What this worker has to say in the mean, float64 of shape ``(num_features,)``."""
    average_shared = held.config.average_shared_statistics
    speakers = speakers_of(held.plan, name, num_features, held.world_size, average_shared=average_shared)
    return speakers[held.rank].double() / speakers.sum(0)


def _average(norms: dict[str, Any], shares: dict[str, torch.Tensor]) -> None:
    if not norms:
        return
    tensors = [norm._buffers[own] for norm in norms.values() for own in STATISTICS]
    # In double precision: where all have the same, the mean is that.
    weighed = [norm._buffers[own].double() * shares[name].to(norm._buffers[own].device)
               for name, norm in norms.items() for own in STATISTICS]  # fmt: skip
    total = torch.cat(weighed)
    dist.all_reduce(total)
    for tensor, mean in zip(tensors, total.split([len(t) for t in tensors]), strict=True):
        tensor.copy_(mean)
    counts = [norm.num_batches_tracked for norm in norms.values() if norm.num_batches_tracked is not None]
    if counts:
        most = torch.stack(counts)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        for count, of_all in zip(counts, most, strict=True):
            count.copy_(of_all)


def recalibrate(model: nn.Module, dataloader: Iterable, num_batches: int) -> None:
    """Estimate the running statistics of the full model's batch norms anew, from this many batches on each worker.

    Under forward masking they are those of subnetworks, in which features are missing that the full model has. They
    become the mean over the batches of all workers, are kept in checkpoints, and change again when training goes on.
    Collective, between two steps of a prepared model, or in a simulation.

    Args:
        dataloader: of batches that are dicts of the model's arguments, on any device. Other ones on each worker.
    Raises: SDPConfigError on every worker: a model without batch norms, one that evaluates subnetworks
        (``evaluate="subnetwork"``), or fewer batches; SDPStateError before the model is prepared.
    """
    model = unwrap(model)
    held = get_state(model).held
    sharded = None if held.simulated else get_sharded(model, "recalibrate")
    come_to(model, "recalibrate")
    norms = batch_norms(model)
    with together():
        if not norms:
            raise SDPConfigError(f"{type(model).__name__} has no batch norms: there is nothing to recalibrate.")
        if held.is_cut and not held.evaluates_full:
            raise SDPConfigError("recalibrate computes the full model, which evaluate='subnetwork' never does.")
        if type(num_batches) is not int or num_batches < 1:
            raise SDPConfigError(f"num_batches must be a positive integer, got {num_batches!r}.")
    get_state(model).run.recalibrated = get_state(model).run.version
    device = next(iter(norms.values())).running_mean.device
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), _of_batches(norms):
            for batch in _exactly(dataloader, num_batches):
                model(**tree_map(lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, batch))
    finally:
        model.train(was_training)
    if sharded is not None:
        sharded.has_new_statistics = False
        with torch.no_grad():
            world = 1 / held.world_size
            _average(norms, {name: torch.full((len(n.running_mean),), world).double() for name, n in norms.items()})


def _exactly(dataloader: Iterable, number: int) -> Iterator[Any]:
    """The first batches; the same number on all workers."""
    batches = iter(dataloader)
    for index in range(number):
        error, batch = None, None
        try:
            batch = next(batches)
        except StopIteration:
            error = SDPConfigError(f"num_batches={number}, but the dataloader has {index}.")
        raise_together(error)
        yield batch


@contextlib.contextmanager
def _of_batches(norms: dict[str, Any]) -> Iterator[None]:
    """Within, norms in eval mode normalize with the statistics of the batch; then they have the means over batches."""
    totals: dict[nn.Module, list] = {norm: [0, 0.0, 0.0] for norm in norms.values()}

    def look(norm: Any, args: tuple) -> None:
        x = args[0].float()
        dims = [dim for dim in range(x.dim()) if dim != 1]
        number = x.numel() // x.shape[1]
        mean, var = x.mean(dims), x.var(dims, correction=0)
        norm._buffers["running_mean"].copy_(mean)
        norm._buffers["running_var"].copy_(var)
        total = totals[norm]
        total[0], total[1] = total[0] + 1, total[1] + mean
        total[2] = total[2] + var * number / max(number - 1, 1)  # as batch norm itself keeps it

    hooks = [norm.register_forward_pre_hook(look) for norm in norms.values()]
    before = {norm: [norm._buffers[name].clone() for name in STATISTICS] for norm in norms.values()}
    try:
        yield
        before.clear()
    finally:
        for hook in hooks:
            hook.remove()
        for norm, (number, mean, var) in totals.items():
            if norm in before:  # something failed
                mean, var = before[norm]
            elif number:
                mean, var = mean / number, var / number
            else:
                continue
            norm._buffers["running_mean"].copy_(mean)  # type: ignore[union-attr]
            norm._buffers["running_var"].copy_(var)  # type: ignore[union-attr]


def statistics_differ(model: nn.Module) -> str | None:
    """The first batch norm whose statistics are not those of rank 0. Collective."""
    problem = None
    for name, norm in batch_norms(unwrap(model)).items():
        for own in STATISTICS:
            mine = norm._buffers[own]
            assert mine is not None
            first = mine.clone()
            dist.broadcast(first, src=0)
            if problem is None and not torch.equal(first, mine):
                problem = f"{name}.{own} differs from that of rank 0 by up to {(first - mine).abs().max().item():g}."
    return problem
