"""Bad input of every subcommand: one line that names the value, exit code 2, and quickly."""

import json

import pytest

from tests.support.cli import refused
from tests.support.models import tiny_config

HUGE = "100000000000"
HUGER = "99999999999999999999"
PLANS = [
    (["--workers", HUGE], HUGE), (["--workers", "0"], "0 is not in"), (["--workers", "-1"], "-1 is not in"),
    (["--workers", "2.5"], "'2.5'"), (["--workers", ""], "''"), (["--workers", "eight"], "'eight'"),
    (["--level", "head"], "'head'"), (["--masking", "both"], "'both'"), (["--balance", "time"], "'time'"),
    (["--coverage", "nan"], "nan"), (["--coverage", "inf"], "inf"), (["--coverage", "1.0000001"], "1.0000001"),
    (["--coverage", "0"], "0.0"), (["--coverage", "0.5,nan"], "nan"),
    (["--coverage", "0.5,0.5"], "lists 2 subnetworks"),
    (["--coverage", "1e-12"], "1e-12"), (["--coverage", "0.5;0.5"], "'0.5;0.5'"),
    (["--memory-gib", "nan"], "nan"), (["--memory-gib", "inf,1"], "inf"), (["--memory-gib", "1e-9,1e-9"], "1e-09"),
    (["--memory-gib", ""], "''"), (["--memory-gib", "1", "--coverage", "0.25"], "coverage=0.25 has no effect"),
    (["--min-replication", "0"], "0 is not in"), (["--min-replication", HUGE], HUGE),
    (["--always-held", HUGER], HUGER), (["--always-held", "first"], "'first'"), (["--always-held", "0,1,2,3"], "all 4"),
    (["--num-subnetworks", HUGE], HUGE), (["--num-subnetworks", "3"], "3 does not divide"),
    (["--seed", "x"], "'x'"), (["--seed", "1e9"], "'1e9'"), (["--depth-profile", "square"], "'square'"),
    (["--block-granularity", "layer"], "block_granularity='layer'"),
    (["--batch", HUGER, "--memory-gib", "1"], HUGER), (["--seq", HUGER], HUGER), (["--seq", "0"], "0 is not in"),
    (["--dtype", "int8"], "'int8'"), (["--optimizer", "lion"], "'lion'"), (["surplus"], "surplus"),
]  # fmt: skip
ESTIMATES = [
    *PLANS[:2], (["--batch", HUGER], HUGER), (["--batch", "1048577"], "1048577"), (["--seq", HUGER], HUGER),
    (["--gib", "nan"], "nan"), (["--gib", "inf"], "inf"), (["--gib", "-1"], "-1"), (["--gib", "0"], "0"),
    (["--gib", "1e300"], "1e.300|in the range"), (["--gib", "forty"], "'forty'"),
    (["--bandwidth", "1e400Gbit", "--flops", "1e12"], "1e400Gbit"), (["--bandwidth", "nan", "--flops", "1"], "nan"),
    (["--flops", "1e12"], "needs both"), (["--flops", "-1", "--bandwidth", "1Gbit"], "-1"),
    (["--param-dtype", "fp8"], "'fp8'"), (["--coverage", "nan"], "nan"), (["--always-held", HUGER], HUGER),
]  # fmt: skip
COMPARES = [
    (["--workers", HUGE], HUGE), (["--batch", HUGER], HUGER), (["--seq", "1"], "1 is not in"),
    (["--seq", HUGER], HUGER),
    (["--learning-rate", "nan"], "nan"), (["--learning-rate", "inf"], "inf"), (["--learning-rate", "-1"], "-1"),
    (["--rounds", "0"], "0 is not in"), (["--warmup", "-1"], "-1"), (["--layers", HUGE], HUGE),
    (["--hidden-size", "-32"], "-32"), (["--hidden-size", "32", "--heads", "3"], "--heads 3"),
    (["--engines", "zero"], "'zero'"), (["--engines", ""], "''"), (["--sdp", "coverage=nan"], "nan"),
    (["--sdp", "level"], "'level'"), (["--throttle", "fast"], "'fast'"), (["--device", "tpu"], "'tpu'"),
    (["--output", "{file}"], "file.txt"), (["--output", "{file}/below"], "below.*cannot be made"),
]  # fmt: skip
MODELS = [
    (["nosuch"], "has no 'nosuch'"), (["llama", ""], "has no ''"),
    (["t5", "--task", "causal"], "has no 't5' for causal"),
    (["--task", "speak"], "'speak'"), (["--processes", "0"], "0 is not in"), (["--limit", "nan"], "nan"),
    (["llama", "--output", "{file}/below"], "file.txt is no folder"),
]  # fmt: skip
SIMULATES = [
    (["--workers", HUGE], HUGE), (["--hidden", "-64"], "-64"), (["--hidden", "abc"], "'abc'"),
    (["--heads", "0"], "0 is"),
    (["--hidden", "1048576", "--heads", "8"], "more than"), (["--layers", HUGE], HUGE),
    (["--vocabulary", "10"], "10 is"),
    (["--steps", "0"], "0 is not"), (["--steps", "7"], "steps=7"), (["--evaluations", "-5"], "-5"),
    (["--lr", "nan"], "nan"),
    (["--lr", "inf"], "inf"), (["--init-range", "0"], "0"), (["--heads", "7"], "num_attention_heads=7"),
    (["--kv-heads", "3"], "3"), (["--seeds", "-1"], "-1"), (["--seeds", "a"], "'a'"), (["--seeds", ""], "''"),
    (["--coverage", "2"], "coverage 2"), (["--coverage", "nan"], "coverage nan"), (["--methods", "magic"], "'magic'"),
    (["--methods", "forward-block@x"], "'x'"), (["--methods", ""], "''"), (["--methods", "forward-neuron@0.3"], "0.3"),
    (["--text", "/no/such/text"], "/no/such/text"),
    (["--processes", "0"], "0 is"), (["--report"], "has no runs"), (["--equal", "time"], "'time'"),
    (["--output", "{file}"], "file.txt"), (["--output", "{file}/below"], "below.*cannot be made"),
]  # fmt: skip
VERIFIES = [
    (["{file}"], "file.txt is no folder"),
    (["x" * 5000], "too long"),
    (["{folder}"], "no config.json"),
    ([""], ""),
]


def llama(**overrides) -> str:
    return json.dumps({**tiny_config(architectures=["LlamaForCausalLM"]).to_dict(), **overrides})


CONFIGS = {
    "negative size": (llama(hidden_size=-32), "-32|negative"),
    "text for a size": (llama(hidden_size="abc"), "abc|hidden_size"),
    "no size": (llama(hidden_size=None), "hidden_size|None"),
    "no heads": (llama(num_attention_heads=0), "zero"),
    "heads that do not divide": (llama(num_key_value_heads=3), ""),
    "an odd head": (llama(head_dim=7), ""),
    "endless layers": (llama(num_hidden_layers=10**12), "1000000000000 layers, more than 4096"),
    "negative layers": (llama(num_hidden_layers=-1), "has no stack of layers|no weights|safetensors"),
    "a huge size": (llama(hidden_size=10**30), "config.json|the config of"),
    "a huge vocabulary": (llama(vocab_size=10**18), "config.json|the config of"),
    "no such activation": (llama(hidden_act="magic"), "magic"),
    "an architecture that is no model": (llama(architectures=["logging"]), "config of"),
    "an architecture that is a number": (llama(architectures=[5]), "config"),
    "a list": ("[]", "config.json cannot be read"),
    "a number": ("5", "config.json cannot be read"),
    "no JSON": ("hidden_size: 32", "config.json cannot be read"),
    "empty": ("", "config.json cannot be read"),
    "bytes": (b"\xff\xfe\x00{", "config.json cannot be read"),
    "cut short": (llama()[:100], "config.json cannot be read"),
    "model_type of a wrong type": ('{"model_type": 5}', "config.json cannot be read|model_type"),
}  # fmt: skip


def check(run, arguments, message, **places):
    refused(run(*(argument.format(**places) for argument in arguments)), message)


@pytest.fixture
def places(tmp_path):
    (tmp_path / "file.txt").write_text("too little")
    (tmp_path / "folder").mkdir()
    return {"file": tmp_path / "file.txt", "folder": tmp_path / "folder"}


def named(case):
    return " ".join(case)[:60] if isinstance(case, list) else ""


@pytest.mark.parametrize(("arguments", "message"), PLANS, ids=named)
def test_plan(run, tiny, arguments, message):
    check(run, ["plan", str(tiny), *arguments], message)


@pytest.mark.parametrize(("arguments", "message"), ESTIMATES, ids=named)
def test_estimate(run, tiny, arguments, message):
    check(run, ["estimate", str(tiny), *arguments], message)


@pytest.mark.parametrize(("arguments", "message"), COMPARES, ids=named)
def test_compare(run, places, tmp_path, arguments, message):
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
    check(run, ["compare", *arguments, *output], message, **places)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "message"), SIMULATES, ids=named)
def test_simulate(run, places, tmp_path, arguments, message):
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
    code, out, err = run("simulate", *(a.format(**places) for a in arguments), *output)
    refused((code, out, err.splitlines(keepends=True)[-1]), message)  # before it, how many runs there are
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(("arguments", "message"), MODELS, ids=named)
def test_models_command(run, places, arguments, message):
    check(run, ["models", *arguments], message, **places)


@pytest.mark.parametrize(("arguments", "message"), VERIFIES, ids=named)
def test_verify(run, places, arguments, message):
    check(run, ["verify", *arguments], message, **places)


@pytest.mark.parametrize("command", ["plan", "estimate", "compare", "verify"])
@pytest.mark.parametrize("case", CONFIGS)
def test_configs(run, tmp_path, command, case):
    content, message = CONFIGS[case]
    (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    arguments = {"compare": ["--model", tmp_path, "--seq", 16, "--output", tmp_path / "out"]}.get(command, [tmp_path])
    refused(run(command, *arguments), message)


@pytest.mark.parametrize("model", ["x" * 5000, "~nobody_here/model", "/dev/null", "a\0b", "."])
def test_models(run, model):
    refused(run("plan", model), "MODEL|no config.json|no folder or file|a named size")
