"""The vote before an optimizer's step: gradients are finite everywhere, and all workers are at the same step.

FSDP2 averages a gradient among its holders: what is not a number on one worker is none on all holders, and nobody can
tell any more where it came from. Hence each worker watches its own losses. They stay on the device until the vote,
which waits for the device once and sends three numbers.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from ..errors import SDPStateError
from ..model.state import local_tensor
from ..world.agreement import of_everyone, raised_by_all
from .sharded import Sharded, get_sharded

logger = logging.getLogger(__name__)


@dataclass
class Watch:
    """What this worker has seen since the last step.

    Attributes:
        loss: sum of the losses of its micro-batches, on the device.
        norm: global, of the gradients that have been clipped; ``clipped``: the ids of their parameters.
    """

    loss: torch.Tensor | None = None
    norm: torch.Tensor | None = None
    clipped: frozenset[int] = frozenset()

    def saw_loss(self, loss: torch.Tensor) -> None:
        loss = loss.detach().float().sum()
        self.loss = loss if self.loss is None else self.loss + loss
        self.norm = None  # of gradients that this backward changes

    def forget(self) -> None:
        self.loss = self.norm = None

    def saw_norm(self, norm: torch.Tensor, parameters: Iterable[nn.Parameter]) -> None:
        self.norm, self.clipped = norm, frozenset(map(id, parameters))


def all_take_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, watch: Watch, step: int, *, finite: bool = True
) -> bool:
    """Whether all workers take this step. Collective: one small all-reduce on the control group.

    Args:
        step: the number of this step, to be compared.
        finite: False leaves gradients to a loss scaler.
    Returns: False when gradients are not finite, with ``SDPConfig(on_nonfinite="skip")``.
    Raises: SDPStateError on every worker: then with "stop"; and when workers are at different steps.
    """
    sharded = get_sharded(model, "An optimizer's step")
    if sharded.control_group is None or sharded.held.config.on_nonfinite == "ignore":
        return True
    loss, gradient = _seen(optimizer, watch) if finite else (0.0, 0.0)
    watch.forget()
    is_bad = not (math.isfinite(loss) and math.isfinite(gradient))
    votes = torch.tensor([is_bad, step, -step], dtype=torch.int64)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=sharded.control_group)
    any_is_bad, last, first = votes[0].item(), votes[1].item(), -votes[2].item()
    if first == last and not any_is_bad:
        return True
    problem = _problem(sharded, step, loss, gradient)
    if first == last and sharded.held.config.on_nonfinite == "skip":
        if sharded.held.rank == 0:
            logger.warning("%s All workers skip this step.", problem)
        return False
    raise raised_by_all(SDPStateError(f"{problem} Nothing was changed by this step. {_REMEDY[first == last]}"))


_REMEDY = {
    True: "SDPConfig(on_nonfinite='skip') leaves such steps out on all workers, 'ignore' does not look for them.",
    False: "Start all workers from the same checkpoint, with the same number of batches.",
}


def _seen(optimizer: torch.optim.Optimizer, watch: Watch) -> tuple[float, float]:
    """Loss and gradient of this worker; they are finite as it is. Waits for the device once."""
    learned = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    gradient = watch.norm
    if gradient is None or not watch.clipped.issuperset(map(id, learned)):
        shards = [shard for p in learned if (shard := local_tensor(p.grad)).numel()]
        largest = torch._foreach_norm(shards or [torch.zeros(1)], math.inf)
        gradient = torch.stack([norm.float() for norm in largest]).max()
    loss = gradient.new_zeros(()) if watch.loss is None else watch.loss.to(gradient.device)
    both = torch.stack([loss, gradient]).tolist()
    return both[0], both[1]


def _problem(sharded: Sharded, step: int, loss: float, gradient: float) -> str:
    """What is wrong, and where; the same on every worker. Collective."""
    everyone = of_everyone((step, loss, gradient), sharded.control_group)
    for rank, (theirs, _, _) in enumerate(everyone):
        if theirs != everyone[0][0]:
            return f"Workers are at different steps: rank 0 at {everyone[0][0]}, rank {rank} at {theirs}."
    losses = [f"{loss} on rank {rank}" for rank, (_, loss, _) in enumerate(everyone) if not math.isfinite(loss)]
    if losses:
        return f"Step {step}: the loss is {', '.join(losses)}."
    ranks = [rank for rank, (_, _, gradient) in enumerate(everyone) if not math.isfinite(gradient)]
    return f"Step {step}: all losses are finite, but the gradients are not, as ranks {ranks} see."
