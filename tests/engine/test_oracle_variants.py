"""Shapes of models, replicas and odd worlds, against N virtual workers in one process."""

import pytest

from tests.support.oracle import compare
from tests.support.training import EVERYTHING


@pytest.mark.parametrize("masking", ["forward", pytest.param("backward", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "config",
    [
        dict(coverage=0.75, reshard_after_forward=True),
        dict(level="block", block_granularity="layer", seed=1),
        *(
            pytest.param(config, marks=pytest.mark.long)
            for config in (
                dict(coverage=0.25),
                dict(level="block", coverage=0.75, reshard_after_forward=True),
                dict(coverage=0.75, sharding="none"),
            )
        ),
    ],
    ids=str,
)
def test_model_variants_equal_the_oracle(config, masking):
    """Grouped queries, biases, tied embeddings; modules in several parts; gathering twice."""
    compare(dict(masking=masking, **config), EVERYTHING, optimizer="adamw", accumulation=2, steps=4)


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(level="block"),
        pytest.param(dict(sharding="none"), marks=pytest.mark.long),
        pytest.param(dict(masking="backward"), marks=pytest.mark.long),
    ],
    ids=str,
)
def test_replicas_of_subnetworks_equal_the_oracle(config):
    """Two subnetworks on four workers: workers 0 and 2 hold the same one."""
    options = dict(coverage=1.0) if config.get("level") != "block" else dict(coverage=0.5)
    compare({**options, **config, "num_subnetworks": 2}, steps=4, oracle=dict(simulate=2), accumulation=2)


def test_an_odd_world_with_uneven_shards_equals_the_oracle():
    """Three workers, two thirds each, sizes that no shard divides: FSDP2 pads, nothing is lost."""
    odd = dict(hidden_size=20, intermediate_size=33, num_attention_heads=5, num_key_value_heads=5)
    compare(dict(coverage=2 / 3), odd, world_size=3, steps=4)
    compare(dict(coverage=2 / 3, level="block"), odd, world_size=3, steps=4)
