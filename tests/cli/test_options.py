"""Options of the command are those of the config."""

import dataclasses
import json

from hf_sdp import SDPConfig, Workload


def test_without_options_it_is_the_plan_of_the_default_config(run, tiny):
    _, out, _ = run("plan", tiny, "--json")
    assert json.loads(out)["sdp_config"] == json.loads(json.dumps(dataclasses.asdict(SDPConfig())))


def test_options_are_those_of_the_config(run, tiny):
    given = dict(
        level="block", masking="backward", coverage=(0.75, 0.5), min_replication=1, balance="compute",
        depth_profile="uniform", always_held=(0, -1), block_granularity="sub-block", num_subnetworks=2, seed=3,
    )  # fmt: skip
    arguments = ["--reshard-after-forward", "--seq", 64]
    for name, value in given.items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else value
        arguments += [f"--{name.replace('_', '-')}", text]
    code, out, err = run("plan", tiny, "--json", *arguments)
    assert code == 0, err
    expected = SDPConfig(**given, reshard_after_forward=True, workload=Workload(batch=1, sequence=64, dtype="bfloat16"))
    assert json.loads(out)["sdp_config"] == json.loads(json.dumps(dataclasses.asdict(expected)))
