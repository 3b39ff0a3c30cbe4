import dataclasses

import pytest
from transformers import HfArgumentParser

from hf_sdp import SDPConfig, SDPConfigError, Workload


@pytest.mark.parametrize(
    "options",
    [
        dict(coverage=0), dict(coverage=1.5), dict(coverage=-0.5), dict(coverage="half"), dict(coverage=True),
        dict(level="layer"), dict(masking="both"), dict(sharding="some"), dict(evaluate="none"),
        dict(coverage=[0.5, 1.5]), dict(coverage=[]), dict(memory_gib=[-1.0]), dict(min_replication=0),
        dict(balance="time"), dict(depth_profile="quadratic"), dict(always_held="first"), dict(always_held=[0.5]),
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
        dict(workload=Workload(batch=1, sequence=8)), dict(coverage=1.0, depth_profile="linear"),
        dict(coverage=[1.0, 1.0], always_held=[0]),
        dict(memory_gib=[1, 1], workload=Workload(batch=1, sequence=8), coverage=0.25),
        dict(simulate=4, num_subnetworks=2), dict(simulate=4, param_dtype="bfloat16"),
    ],
)  # fmt: skip
def test_an_option_without_effect_is_an_error(options):
    with pytest.raises(SDPConfigError, match="no effect"):
        SDPConfig(**options)


@pytest.mark.parametrize(
    ("arguments", "config"),
    [
        ("", SDPConfig()),
        ("--sdp_level block --sdp_coverage 0.25", SDPConfig(level="block", coverage=0.25)),
        (
            "--sdp_masking backward --sdp_num_subnetworks 2 --sdp_param_dtype bfloat16",
            SDPConfig(masking="backward", num_subnetworks=2, param_dtype="bfloat16"),
        ),
        (
            "--sdp_coverage 0.75 0.25 --sdp_always_held 0 -1 --sdp_depth_profile linear",
            SDPConfig(coverage=[0.75, 0.25], always_held=[0, -1], depth_profile="linear"),
        ),
        (
            "--sdp_memory_gib 24 12 --sdp_workload batch=4,sequence=1024,dtype=bf16 --sdp_balance compute"
            " --sdp_param_dtype bfloat16",
            SDPConfig(
                memory_gib=[24, 12],
                workload=Workload(batch=4, sequence=1024, dtype="bfloat16"),
                balance="compute",
                param_dtype="bfloat16",
            ),
        ),
    ],
)
def test_config_from_the_command_line(arguments, config):
    (parsed,) = HfArgumentParser(SDPConfig.arguments()).parse_args_into_dataclasses(arguments.split())
    assert SDPConfig.from_arguments(parsed) == config


def test_every_option_has_a_help_text():
    assert all(f.metadata["help"] for f in dataclasses.fields(SDPConfig))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batch=4", "lacks.*sequence"), ("batch=4,length=8", "length=8"), ("batch=x,sequence=8", "batch=x"),
        ("batch=0,sequence=8", "batch must be"), ("batch=1,sequence=8,dtype=int8", "dtype must be"),
        ("batch=1,sequence=8,optimizer=lion", "optimizer must be"),
    ],
)  # fmt: skip
def test_a_workload_that_is_not_understood_is_an_error(text, message):
    with pytest.raises(SDPConfigError, match=message):
        SDPConfig(memory_gib=[1, 1], workload=text)


def test_memory_needs_a_workload_that_the_run_will_have():
    with pytest.raises(SDPConfigError, match="needs a workload"):
        SDPConfig(memory_gib=[1, 1])
    with pytest.raises(SDPConfigError, match="gathered in float32.*Use param_dtype='bfloat16'"):
        SDPConfig(memory_gib=[1, 1], workload=Workload(batch=1, sequence=8, dtype="bfloat16"))
