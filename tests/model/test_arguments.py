"""Position biases that a model makes for all layers: attention that is cut takes those of its heads."""

import pytest

from hf_sdp import SDPConfig
from hf_sdp.bench.support.check import check
from hf_sdp.bench.support.tiny import tiny_config


@pytest.mark.parametrize("coverage", [0.5, 0.75])
@pytest.mark.parametrize(
    ("model_type", "task"), [("bloom", "causal"), ("mpt", "causal"), ("t5", "sequence to sequence")]
)
def test_gradients_equal_those_of_the_dense_model(model_type, task, coverage):
    plan = check(tiny_config(model_type), task, SDPConfig(level="neuron", coverage=coverage), world=4, ranks=(0, 3))
    assert any(module.arguments for module in plan.modules)
