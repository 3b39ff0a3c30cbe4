"""Unequal workers, depth profiles and layers that are always held, against N virtual workers in one process."""

import pytest

from tests.support.oracle import compare

UNEQUAL = [0.75, 0.5, 0.5, 0.25]


@pytest.mark.parametrize(
    ("level", "masking", "sharding"),
    [
        ("neuron", "forward", "full"),
        ("block", "backward", "none"),
        *(
            pytest.param(*choices, marks=pytest.mark.long)
            for choices in (
                ("neuron", "forward", "none"),
                ("neuron", "backward", "full"),
                ("neuron", "backward", "none"),
                ("block", "forward", "full"),
                ("block", "forward", "none"),
                ("block", "backward", "full"),
            )
        ),
    ],
)
def test_unequal_workers_equal_the_oracle(level, masking, sharding):
    compare(dict(level=level, masking=masking, sharding=sharding, coverage=UNEQUAL), accumulation=2, steps=6)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(dict(level="neuron", depth_profile="linear"), marks=pytest.mark.long),
        dict(level="block", depth_profile="linear", masking="backward"),
        dict(level="neuron", always_held=[0, -1], coverage=[0.25, 0.25, 0.5, 0.75], reshard_after_forward=True),
        pytest.param(
            dict(level="block", always_held=[-1], coverage=[1.0, 0.5, 0.5, 0.5], balance="compute"),
            marks=pytest.mark.long,
        ),
        # Units with one and with two holders in one module: the mean is over another number for each slice.
        pytest.param(
            dict(level="neuron", coverage=[0.75, 0.25, 0.25, 0.25], masking="backward"), marks=pytest.mark.long
        ),
        dict(level="neuron", coverage=[0.75, 0.25, 0.25, 0.25]),
    ],
    ids=str,
)
def test_profiles_and_held_layers_equal_the_oracle(options):
    compare(
        {"coverage": 0.5, **options}, model_options=dict(attention_bias=True, mlp_bias=True), optimizer="adamw", steps=8
    )


def test_replicas_of_unequal_subnetworks_equal_the_oracle():
    compare(dict(coverage=[0.75, 0.25], num_subnetworks=2), steps=6, oracle=dict(simulate=2))
