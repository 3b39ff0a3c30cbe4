"""The unmodified Trainer on model types of all structures."""

import pytest

from tests.support.runs import train_resume_and_reload
from tests.support.types import BLOCK, MODELS, NEURON, short


@pytest.mark.parametrize("name", short("mixtral"))
@pytest.mark.parametrize("sdp", [BLOCK, pytest.param(NEURON | dict(coverage=0.5), marks=pytest.mark.long)], ids=str)
def test_the_trainer_equals_the_simulation_and_resumes(tmp_path, name, sdp):
    (losses, norms, _), simulated = train_resume_and_reload(tmp_path, sdp, MODELS[name])
    assert losses == pytest.approx(simulated[0], abs=1e-4)
    assert norms == pytest.approx(simulated[1], rel=1e-4)
