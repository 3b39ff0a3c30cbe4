"""N worker processes against N virtual workers in one process: same data, same parameters, same norms."""

import itertools

import pytest

from tests.support.oracle import compare

CHOICES = (("neuron", "block"), ("forward", "backward"), ("full", "none"), (1, 3), ("sgd", "adamw"))


def _cases():
    """All combinations. Every two choices meet in those that are not long (an orthogonal array of strength 2)."""
    for level, masking, sharding, accumulation, optimizer in itertools.product((0, 1), repeat=5):
        indices = (level, masking, sharding, accumulation, optimizer)
        chosen = [values[index] for values, index in zip(CHOICES, indices, strict=True)]
        is_short = accumulation == level ^ masking and optimizer == level ^ sharding
        yield pytest.param(*chosen, 10, marks=() if is_short else pytest.mark.long)
    yield pytest.param("neuron", "forward", "full", 3, "adamw", 40, marks=pytest.mark.long)


@pytest.mark.parametrize(("level", "masking", "sharding", "accumulation", "optimizer", "steps"), list(_cases()))
def test_workers_equal_the_oracle(level, masking, sharding, accumulation, optimizer, steps):
    compare(
        dict(level=level, masking=masking, sharding=sharding, coverage=0.5),
        optimizer=optimizer,
        accumulation=accumulation,
        steps=steps,
    )
