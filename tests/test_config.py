import dataclasses

import pytest
from transformers import HfArgumentParser

from hf_sdp import SDPConfig, SDPConfigError


@pytest.mark.parametrize(
    "options",
    [
        dict(coverage=0), dict(coverage=1.5), dict(coverage=-0.5), dict(coverage="half"), dict(coverage=True),
        dict(level="layer"), dict(masking="both"), dict(sharding="some"), dict(evaluate="none"),
        dict(num_subnetworks=0), dict(simulate=-1), dict(evaluation_timeout_s=0), dict(param_dtype="int8"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_errors_that_name_the_value(options):
    ((name, value),) = options.items()
    with pytest.raises(SDPConfigError, match=name) as error:
        SDPConfig(**options)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "options",
    [
        dict(block_granularity="layer"), dict(sharding="none", reshard_after_forward=True),
        dict(masking="backward", evaluate="subnetwork"), dict(simulate=4, sharding="none"),
        dict(simulate=4, num_subnetworks=2), dict(simulate=4, param_dtype="bfloat16"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_an_error(options):
    with pytest.raises(SDPConfigError, match="no effect"):
        SDPConfig(**options)


def test_config_is_an_argument_dataclass_with_and_without_prefix():
    (parsed,) = HfArgumentParser(SDPConfig).parse_args_into_dataclasses(["--level", "block", "--coverage", "0.25"])
    assert parsed == SDPConfig(level="block", coverage=0.25)
    (arguments,) = HfArgumentParser(SDPConfig.arguments()).parse_args_into_dataclasses(
        ["--sdp_masking", "backward", "--sdp_num_subnetworks", "2", "--sdp_param_dtype", "bfloat16"]
    )
    assert SDPConfig.from_arguments(arguments) == SDPConfig(
        masking="backward", num_subnetworks=2, param_dtype="bfloat16"
    )
    assert all(f.metadata["help"] for f in dataclasses.fields(SDPConfig))
