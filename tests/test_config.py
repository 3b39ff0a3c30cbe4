import dataclasses
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

import pytest
from transformers import HfArgumentParser

from hf_sdp import SDPConfig, SDPConfigError, Workload, options, workload

FIELDS = {field.name: field for field in dataclasses.fields(SDPConfig)}


@pytest.mark.parametrize(
    "options",
    [
        dict(coverage=0), dict(coverage=1.5), dict(coverage=-0.5), dict(coverage="half"), dict(coverage=True),
        dict(level="layer"), dict(masking="both"), dict(sharding="some"), dict(evaluate="none"),
        dict(coverage=[0.5, 1.5]), dict(coverage=[]), dict(memory_gib=[-1.0]), dict(min_replication=0),
        dict(balance="time"), dict(depth_profile="quadratic"), dict(always_held="first"), dict(always_held=[0.5]),
        dict(num_subnetworks=0), dict(simulate=-1), dict(evaluation_timeout_s=0), dict(param_dtype="int8"),
        dict(recalibrate_batches=0),
        dict(min_replication=True), dict(simulate=2.0), dict(evaluation_timeout_s="600"), dict(reduce_dtype="bf16"),
        dict(reshard_after_forward="false"), dict(block_granularity="head"), dict(seed="a"), dict(seed=1.5),
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
        dict(recalibrate_batches=2, evaluate="subnetwork"),
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


def test_the_argument_parser_knows_choices_defaults_and_help(capsys):
    parser = HfArgumentParser(SDPConfig.arguments(prefix="x_"))
    with pytest.raises(SystemExit):
        parser.parse_args(["--x_level", "layer"])
    assert "invalid choice: 'layer'" in capsys.readouterr().err
    text = " ".join(parser.format_help().split())
    for field in FIELDS.values():
        assert f"--x_{field.name}" in text and field.metadata["help"].split(". ")[0] in text


@pytest.mark.parametrize("cls", [SDPConfig, Workload])
def test_every_option_has_a_help_text(cls):
    assert all(f.metadata["help"].endswith(".") for f in dataclasses.fields(cls))


def test_choices_are_those_of_the_types():
    assert options.kind_of(FIELDS["level"].type).choices == ("neuron", "block")
    assert options.kind_of(FIELDS["param_dtype"].type).choices == ("float32", "bfloat16", "float16")
    for dtype in ("float32", "bfloat16", "float16"):
        assert SDPConfig(param_dtype=dtype).param_dtype == dtype


def test_types_and_figures_of_a_workload_have_the_same_names():
    assert get_args(workload.Dtype) == tuple(workload.DTYPES) == tuple(workload.SHORT_DTYPES.values())
    assert get_args(workload.Optimizer) == tuple(workload.OPTIMIZER_STATES)


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [
        (int, " -3", -3), (int | None, "3", 3), (float, "1e-3", 1e-3), (bool, "True", True), (bool, "false", False),
        (Literal["a", "b"], "a", "a"), (Literal["a", "b"] | None, "b", "b"),
        (Sequence[int], "0", (0,)), (Sequence[int], "0, -1", (0, -1)), (Sequence[float] | None, "24,12", (24.0, 12.0)),
        (float | Sequence[float], "0.5", 0.5), (float | Sequence[float], "0.75,0.5", (0.75, 0.5)),
        (Workload | None, "batch=2,sequence=8", Workload(batch=2, sequence=8)),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_is_read_by_its_type(annotation, text, value):
    read = options.parse(annotation, text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("annotation", "text", "message"),
    [
        (int, "2.5", "'2.5' is not a whole number"), (float, "half", "'half' is not a number"),
        (bool, "yes", "'yes' is not true or false"), (Sequence[int], "0,x", "'0,x' is no list of numbers"),
        (float | Sequence[float], "", "'' is no list of numbers"), (Sequence[int], "0,", "'0,' is no list of numbers"),
    ],
    ids=str,
)  # fmt: skip
def test_text_that_is_no_value_is_an_error(annotation, text, message):
    with pytest.raises(ValueError, match=message):
        options.parse(annotation, text)


def parse_all(text: str) -> dict:
    return options.parse_all(FIELDS.values(), text, what="--sdp", example="level=block")


def test_lists_go_on_until_the_next_name():
    text = "coverage=0.75,0.5, level = block ,always_held=0,reshard_after_forward=True,memory_gib=1,2"
    assert parse_all(text) == {
        "coverage": (0.75, 0.5), "level": "block", "always_held": (0,), "reshard_after_forward": True,
        "memory_gib": (1.0, 2.0),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        ("", ""), ("level", "level"), ("=block", "=block"), ("color=red", "color=red"), ("seed=1,2", "seed=1,2"),
        ("seed=1,seed=2", "seed=2"), ("seed=x", "seed=x"), ("seed=", "seed="), ("coverage=0.5,,1", "coverage=0.5,,1"),
        ("coverage=0.5,level=block,color=red,seed=1", "color=red"), ("level=block,coverage=a,b", "coverage=a,b"),
    ],
)  # fmt: skip
def test_options_that_are_not_understood_are_named(text, piece):
    with pytest.raises(
        SDPConfigError, match=f"^--sdp '{text}': '{piece}' is not understood. Write it as level=block with"
    ):
        parse_all(text)


def test_the_tables_of_the_documentation_are_those_of_the_fields():
    page = Path(options.__file__).with_name("OPTIONS.md").read_text()
    written = page.partition("<!-- options -->")[2].partition("<!-- /options -->")[0].strip()
    printed = subprocess.run([sys.executable, "-m", "hf_sdp.config"], capture_output=True, text=True, check=True).stdout
    assert written == printed.strip(), "write what `python -m hf_sdp.config` prints into hf_sdp/OPTIONS.md"


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
