"""Lower precision through a boundary: weights and state stay in full precision, and go over without rounding."""

import pytest
import torch
import torch.distributed as dist

from hf_sdp import consolidate
from tests.support.models import batch
from tests.support.training import prepared
from tests.support.workers import run_workers

GROWS = [(0.0, 0.5), (0.5, 1.0)]
PRECISIONS = {
    "float32": ({}, {}),
    "param_dtype": (dict(param_dtype="bfloat16"), {}),
    "param_dtype, reduced in float32": (dict(param_dtype="bfloat16", reduce_dtype="float32"), {}),
    "autocast": ({}, dict(mixed_precision="bf16")),
}


def train(precision: str, config: dict, boundary: int | None, steps: int = 4):
    """The second phase begins before the step ``boundary``."""
    options, of_accelerator = PRECISIONS[precision]
    accelerator, model, optimizer = prepared(config | options, **of_accelerator)
    losses, norms = [], []
    for step in range(steps):
        if step == boundary:
            before = consolidate(model)
            assert accelerator.follow_schedule(1, 2)
            after = consolidate(model)
            assert before is None or all(torch.equal(after[name], before[name]) for name in before)
        loss = model(**batch(step * dist.get_world_size() + dist.get_rank())).loss
        accelerator.backward(loss)
        losses.append(loss.item())
        norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    tensors = [*model.parameters(), *(t for state in optimizer.state.values() for t in state.values())]
    return (losses, norms), consolidate(model), {t.dtype for t in tensors}


LONG = [pytest.param(p, marks=pytest.mark.long) for p in ("autocast", "param_dtype, reduced in float32")]


@pytest.mark.parametrize("precision", ["param_dtype", *LONG])
def test_weights_stay_in_float32_through_a_boundary(precision):
    lower, full = (
        run_workers(train, p, dict(coverage_schedule=GROWS), 2, world_size=2) for p in (precision, "float32")
    )
    for ((losses, _), _, dtypes), ((expected, _), _, _) in zip(lower, full, strict=True):
        assert dtypes == {torch.float32}
        assert losses == pytest.approx(expected, rel=1e-2) and losses != expected


@pytest.mark.parametrize(
    "precision", [*(pytest.param(p, marks=pytest.mark.long) for p in ("float32", "autocast")), "param_dtype"]
)
@pytest.mark.parametrize("level", ["block", pytest.param("neuron", marks=pytest.mark.long)])
def test_a_model_that_goes_on_in_its_last_phase_is_one_that_was_patched_so(precision, level):
    schedule = dict(level=level, coverage_schedule=["0:1", "0.5:0.5"])
    over = run_workers(train, precision, schedule, 0, world_size=2)
    patched = run_workers(train, precision, dict(level=level), None, world_size=2)
    for (logged, weights, _), (expected, of_patched, _) in zip(over, patched, strict=True):
        assert logged == expected
        assert weights is None or all(torch.equal(weights[name], of_patched[name]) for name in of_patched)
