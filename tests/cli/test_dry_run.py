"""What ``hf_sdp.run --dry-run`` refuses, in this process."""

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_sdp import SDPConfig, SDPConfigError
from hf_sdp.cli.dry_run import show
from tests.support.models import tiny_config


@pytest.mark.parametrize("options", [dict(), dict(coverage=1.0), dict(num_subnetworks=4)], ids=str)
def test_of_one_process_it_is_refused_as_the_training_would_be(options, capsys):
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_config())
    with pytest.raises(SDPConfigError, match="SDP needs at least 2 workers, .* Launch the dry run as the training"):
        show(model, SDPConfig(**options), 1, None, None)
    assert capsys.readouterr().out == ""
