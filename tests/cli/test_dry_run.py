"""What ``hf_sdp.run --dry-run`` refuses, in this process."""

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_sdp import SDPConfig, SDPConfigError
from hf_sdp.cli.dry_run import show
from hf_sdp.run import _stop
from tests.support.models import tiny_config


@pytest.fixture
def model():
    with torch.device("meta"):
        return LlamaForCausalLM(tiny_config())


@pytest.mark.parametrize("options", [dict(), dict(coverage=1.0), dict(num_subnetworks=4)], ids=str)
def test_of_one_process_it_is_refused_as_the_training_would_be(options, model, capsys):
    with pytest.raises(SDPConfigError, match="SDP needs at least 2 workers, .* Launch the dry run as the training"):
        show(model, SDPConfig(**options), 1, None, None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(coverage=0.3), "coverage=0.3 of 4 subnetworks gives 1.2 holders per unit"),
        (dict(num_subnetworks=3), "num_subnetworks=3 does not divide the world of 4 workers"),
    ],
    ids=str,
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(options, message, model, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit) as ended:
        _stop(SDPConfig(**options), None, model, None)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.startswith(f"hf_sdp.run: {message}") and err.count("\n") == 1


def test_a_step_that_the_model_cannot_compute_is_one_line_too(model, capsys, monkeypatch):
    def fails(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied\n(1x2 and 3x4)")

    monkeypatch.setattr("hf_sdp.cli.dry_run.other_rows", fails)
    with pytest.raises(SystemExit) as ended:
        _stop(SDPConfig(simulate=4), None, model, None)
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("hf_sdp.run: A step of the model of LlamaForCausalLM cannot be computed: mat1 and mat2")
