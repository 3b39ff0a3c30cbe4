"""A phase that splits its micro-batches: as many tokens a step, fewer at a time. Source: transformers/trainer.py
(``training_step``).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from ..compat import tree_leaves
from ..engine.presence import announce
from ..engine.shard import kept_gathered
from ..engine.sharded import find_sharded
from ..errors import SDPConfigError
from ..model.phases import Schedule
from ..model.state import find_state, unwrap
from ..world.agreement import of_everyone, raised_by_all


def _training_step(original):
    def training_step(self, model, inputs, num_items_in_batch=None):
        _refuse_rows_that_may_belong_together(self, inputs)
        pieces = _pieces(model, inputs)
        if len(pieces) == 1:
            return original(self, model, inputs, num_items_in_batch)
        rows, losses = sum(number for number, _ in pieces), []
        for index, (number, piece) in enumerate(pieces):
            # Reduced at once: gradients that are not are as large as all that is gathered.
            goes_on = index < len(pieces) - 1 and self.accelerator.sync_gradients
            with _kept_gathered(model) if goes_on else contextlib.nullcontext(), _of_a_piece(self, number / rows):
                losses.append(original(self, model, piece, num_items_in_batch))
        return torch.stack(losses).sum()

    return training_step


def _refuse_rows_that_may_belong_together(trainer: Any, inputs: dict[str, Any]) -> None:
    """Pairs of a preference, negatives within a batch: their loss is not the mean of what it is of each piece. Such
    batches have no labels. Raises SDPConfigError in the first step, whichever phase it is that splits."""
    schedule = _schedule(trainer.model)
    if schedule is None or all(planned.phase.splits == 1 for planned in schedule.phases):
        return
    if not any(name in inputs for name in trainer.label_names):
        raise raised_by_all(
            SDPConfigError(
                f"splits of a phase: a batch has none of the labels {trainer.label_names}, but {sorted(inputs)}. Its "
                "rows may belong together (pairs of a preference), and the loss be another one in pieces. Use "
                "gradient_checkpointing of the phase, or name in TrainingArguments(label_names=[...]) what has a row "
                "for each row of the batch."
            )
        )


def _schedule(model: Any) -> Schedule | None:
    state = find_state(model)
    return None if state is None else state.schedule


def _kept_gathered(model: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if find_sharded(model) is None else kept_gathered(unwrap(model))  # type: ignore[arg-type]


def _pieces(model: Any, inputs: dict[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """Of a batch, in the phase that the model is in: on all workers as many, since a forward may be a collective."""
    schedule, sharded = _schedule(model), find_sharded(model)
    splits = 1 if schedule is None else schedule.current.phase.splits
    pieces = split(inputs, splits)
    if splits > 1 and sharded is not None:
        announce(model, "splitting a micro-batch")
        pieces = split(inputs, min(of_everyone(len(pieces), sharded.control_group)))  # some may have fewer rows
    return pieces


def split(inputs: dict[str, Any], splits: int) -> list[tuple[int, dict[str, Any]]]:
    """A batch in so many pieces, or as many as it has rows: of each its number of rows, and what it has.

    Tensors of as many rows as the labels (or the first tensor) are split along dim 0; all else is given to each piece.
    """
    tensors = [value for value in (inputs.get("labels"), *inputs.values()) if _has_rows(value)]
    rows = len(tensors[0]) if tensors else 1
    starts = [rows * index // splits for index in range(splits + 1)]
    return [
        (stop - start, {k: v[start:stop] if _has_rows(v) and len(v) == rows else v for k, v in inputs.items()})
        for start, stop in zip(starts, starts[1:], strict=False)
        if start < stop
    ]


def _has_rows(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() > 0


@contextlib.contextmanager
def _of_a_piece(trainer: Any, share: float) -> Iterator[None]:
    """Within, a loss that is a mean over the rows of a piece counts by its share of the batch.

    Where the host gives the number of items of the batch, some models divide by it, and others take the mean all the
    same: it is seen in what the loss was computed from.
    """
    compute_loss = trainer.compute_loss

    def weighed(model, inputs, *args, num_items_in_batch=None, **kwargs):
        number = num_items_in_batch
        if number is not None:
            number = torch.as_tensor(number).as_subclass(_Watched)
            number.used_with = []
        loss = compute_loss(model, inputs, *args, num_items_in_batch=number, **kwargs)
        return loss if number is not None and number.used_with else loss * share

    vars(trainer)["compute_loss"] = weighed
    try:
        yield
    finally:
        del vars(trainer)["compute_loss"]


class _Watched(torch.Tensor):
    """``used_with``: what was computed from it together with other tensors. (Whether it gets a gradient would tell as
    much, but FSDP2 gives all inputs with gradients to its own functions.)"""

    used_with: list

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs or {})
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
        used_with = next(value.used_with for value in given if isinstance(value, _Watched))
        if len(given) > 1:
            used_with.append(func)
        elif isinstance(result, torch.Tensor):  # the same on another device, or of another dtype
            result = result.as_subclass(_Watched)
            result.used_with = used_with
        return result


SPLITS = {"training_step": _training_step}
"""Trainer method -> its wrap."""
