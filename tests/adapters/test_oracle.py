"""LoRA adapters trained by several workers, against N virtual workers in one process."""

import pytest

from tests.support.oracle import compare
from tests.support.training import EVERYTHING

pytest.importorskip("peft")

LEVELS = [
    dict(level="block"),
    dict(coverage=0.5),
    dict(coverage=0.75),
    dict(coverage=0.75, masking="backward"),
    dict(level="block", masking="backward"),
]


@pytest.mark.parametrize("config", LEVELS, ids=str)
def test_adapters_equal_the_oracle(config):
    """Grouped queries, biases, tied embeddings; of four workers some have modules in several parts."""
    compare(config, {**EVERYTHING, "lora": {}}, steps=4, optimizer="adamw")


@pytest.mark.parametrize("config", LEVELS, ids=str)
def test_magnitudes_equal_the_oracle(config):
    compare(config, {**EVERYTHING, "lora": dict(use_dora=True)}, steps=4)
