"""N worker processes against N virtual workers in one process: same data, same parameters, same norms."""

import pytest

from tests.support.oracle import compare


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("sharding", ["full", "none"])
@pytest.mark.parametrize("masking", ["forward", "backward"])
@pytest.mark.parametrize("level", ["neuron", "block"])
def test_workers_equal_the_oracle(level, masking, sharding, accumulation, optimizer):
    compare(
        dict(level=level, masking=masking, sharding=sharding, coverage=0.5),
        optimizer=optimizer,
        accumulation=accumulation,
    )
