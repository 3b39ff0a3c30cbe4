"""What a script's own comparison compares with."""

import pytest

from hf_sdp import SDPConfig, Workload
from hf_sdp.bench.script import config_of


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sharding": "none"},
        {"level": "neuron", "depth_profile": "linear", "always_held": (0,)},
        {"masking": "backward", "reshard_after_forward": True},
        {"memory_gib": (1.0, 2.0), "level": "block", "workload": Workload(batch=1, sequence=128)},
    ],
    ids=str,
)
def test_the_column_called_fsdp2_is_all_of_the_model_sharded_and_resharded(options):
    config = config_of("fsdp2", SDPConfig(**options))
    assert (config.coverage, config.sharding, config.reshard_after_forward) == (1.0, "full", True)
    assert config_of("sdp", SDPConfig(**options)) == SDPConfig(**options)
