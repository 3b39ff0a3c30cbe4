"""LoRA under the unmodified Trainer: against the simulation, resumed, and its adapters loaded by PEFT alone."""

import pytest

from tests.support.runs import train_resume_and_reload
from tests.support.training import EVERYTHING

pytest.importorskip("peft")


@pytest.mark.parametrize(
    "sdp", [dict(level="block"), dict(level="neuron", coverage=0.5), dict(masking="backward")], ids=str
)
def test_a_run_equals_the_simulation_and_resumes_and_its_adapters_are_peft_s(tmp_path, sdp):
    (losses, norms, loss), simulated = train_resume_and_reload(tmp_path, sdp, {**EVERYTHING, "lora": {}})
    assert losses == pytest.approx(simulated[0], abs=1e-4)
    assert norms == pytest.approx(simulated[1], rel=1e-3)
    assert loss == pytest.approx(simulated[2], abs=1e-4)
