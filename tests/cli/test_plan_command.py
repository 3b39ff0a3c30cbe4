"""``hf-sdp plan``: what it prints, draws and refuses."""

import json

import pytest

from hf_sdp import SDPConfig, make_plan
from hf_sdp.cli.tables import short, short_bytes
from tests.support.cli import refused
from tests.support.models import tiny_config, tiny_model
from tests.support.types import MODELS


def test_plan_as_json_has_every_figure(run, tiny):
    code, out, err = run(
        "plan", tiny, "--workers", 8, "--num-subnetworks", 4, "--level", "block", "--seq", 64, "--json"
    )
    assert (code, err) == (0, "")
    result = json.loads(out)
    plan = make_plan(tiny_config(), SDPConfig(level="block"), 4)
    assert result["plan_hash"] == plan.hash and result["num_workers"] == 8 and result["sdp_config"]["level"] == "block"
    assert [s["parameters"]["total"] for s in result["subnetworks"]] == [plan.numel(w) for w in range(4)]
    assert result["subnetworks"][1]["workers"] == [1, 5]
    assert result["full"]["parameters"].keys() == {"attention", "mlp", "shared"}
    assert result["summary"].keys() == {
        "coverage", "replication", "num_units", "num_holder_sets", "parameters", "parameters_full",
        "parameters_straggler_ratio", "flops_per_token", "flops_per_token_full", "flops_straggler_ratio",
        "bytes_sent_per_step", "bytes_sent_straggler_ratio", "num_components", "spectral_gap",
    }  # fmt: skip
    assert result["summary"]["num_components"] == 1 and 0 < result["summary"]["spectral_gap"] <= 1


SCHEDULE = "0:0.5,0.6:1:level=block"


def test_each_phase_of_a_schedule_has_its_plan(run, tiny):
    code, out, err = run("plan", tiny, "--workers", 4, "--coverage-schedule", SCHEDULE, "--seq", 64, "--json")
    assert (code, err) == (0, "")
    phases = json.loads(out)["phases"]
    assert [(phase["start"], phase["sdp_config"]["level"]) for phase in phases] == [(0, "neuron"), (0.6, "block")]
    plans = [make_plan(tiny_config(), SDPConfig(**sdp), 4) for sdp in (dict(), dict(level="block", coverage=1.0))]
    assert [phase["plan_hash"] for phase in phases] == [plan.hash for plan in plans]
    code, out, err = run("plan", tiny, "--workers", 4, "--coverage-schedule", SCHEDULE, "--seq", 64)
    assert (code, err) == (0, "") and "from 0.6 of the training on" in out
    result = run("plan", tiny, "--workers", 4, "--coverage-schedule", SCHEDULE, "--picture", tiny / "plan.png")
    refused(result, "--picture draws one plan")


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "bert", "t5", "whisper"])
def test_models_of_other_structures(run, tmp_path, name):
    model = tiny_model(**MODELS[name])
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    code, out, err = run("plan", tmp_path, "--workers", 2, "--level", "block", "--seq", 32, "--json")
    assert (code, err) == (0, "")
    result = json.loads(out)
    assert result["summary"]["parameters_full"] == sum(p.numel() for p in model.parameters())
    assert result["plan_hash"] == make_plan(model, SDPConfig(level="block"), 2).hash
    assert result["summary"]["flops_per_token"]["max"] < result["summary"]["flops_per_token_full"]


def test_plan_as_tables(run, tiny):
    code, out, _ = run("plan", tiny / "config.json", "--workers", 4, "--dtype", "fp32", "--sharding", "none")
    assert code == 0
    for text in (
        "4 subnetworks, neuron level, forward masking",
        "50.0%",
        "connected",
        "spectral gap",
        "(fp32, sharding none)",
    ):
        assert text in out
    assert max(map(len, out.splitlines())) <= 120


def test_many_subnetworks_are_summed_up(run, tiny):
    code, out, _ = run("plan", tiny, "--workers", 32, "--level", "block")
    rows = [line.split()[1] for line in out.splitlines() if line.startswith("│")][:12]
    assert code == 0 and rows == [*map(str, range(8)), "...", "min", "mean", "max"]


def test_bytes_halve_with_half_precision_and_grow_with_resharding(run, tiny):
    sent = {}
    for options in (("--dtype", "fp32"), ("--dtype", "bf16"), ("--dtype", "fp32", "--reshard-after-forward")):
        _, out, _ = run("plan", tiny, "--json", "--workers", 4, *options)
        sent[options] = json.loads(out)["summary"]["bytes_sent_per_step"]["mean"]
    fp32, bf16, resharded = sent.values()
    assert bf16 == fp32 / 2 and resharded == pytest.approx(1.5 * fp32)


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
def test_the_picture_is_written(run, tiny, tmp_path, name):
    code, out, _ = run("plan", tiny, "--workers", 4, "--picture", tmp_path / name)
    start = (tmp_path / name).read_bytes()[:8]
    assert code == 0 and name in out and start == (b"\x89PNG\r\n\x1a\n" if name.endswith("png") else b"<?xml ve")


@pytest.mark.parametrize("name", ["llama-134m", "llama-500m", "llama-1b", "llama-7b"])
def test_named_sizes(run, name):
    _, out, _ = run("plan", name, "--json", "--workers", 4)
    size, unit = float(name[6:-1]), {"m": 1e6, "b": 1e9}[name[-1]]
    assert sum(json.loads(out)["full"]["parameters"].values()) == pytest.approx(size * unit, rel=0.12)


def llama(**overrides) -> str:
    return json.dumps({**tiny_config(architectures=["LlamaForCausalLM"]).to_dict(), **overrides})


BAD_CONFIGS = {
    "unsupported family": (
        '{"model_type": "mobilenet_v1", "architectures": ["MobileNetV1ForImageClassification"]}',
        "MobileNetV1ForImageClassification.*has no stack of layers",
    ),
    "unknown model_type": ('{"model_type": "nonsense"}', "config.json cannot be read.*nonsense"),
    "no model_type": ("{}", "config.json cannot be read"),
    "no JSON": ("hello", "config.json cannot be read.*not a valid JSON"),
    "negative size": (llama(hidden_size=-32), "No model can be made of the config.*negative"),
    "text for a number": (llama(hidden_size="wide"), "config.json cannot be read.*hidden_size"),
    "no layers": (llama(num_hidden_layers=0), "LlamaForCausalLM.*has no stack of layers"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_refused_in_one_line(run, tmp_path, case):
    content, message = BAD_CONFIGS[case]
    (tmp_path / "config.json").write_text(content)
    refused(run("plan", tmp_path), message)


def test_a_picture_that_cannot_be_written_is_one_line(run, tiny, tmp_path):
    (tmp_path / "plan.png").mkdir()  # nobody can write a file there, root neither
    refused(
        run("plan", tiny, "--picture", tmp_path / "plan.png"), "--picture .*plan.png cannot be written: Is a directory"
    )


def test_without_network_the_hub_is_asked_once(run, monkeypatch, caplog):
    """By default transformers and huggingface_hub would ask six times, wait in between and warn each time."""
    asked = []

    def no_network(*arguments, **options):
        asked.append(arguments)
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr("hf_sdp.cli.models.get_hf_file_metadata", no_network)
    refused(run("plan", "some/model"), "'some/model' is no named size.*from the hub: .*Name or service not known")
    assert len(asked) == 1 and not caplog.records


def test_short_numbers():
    assert [short(v) for v in (0, 999, 1000, 67_108_864, 6.74e9)] == ["0", "999", "1 k", "67.1 M", "6.74 G"]
    assert [short_bytes(v) for v in (0, 1023, 1024, 1.5 * 2**30)] == ["0 B", "1023 B", "1 KiB", "1.5 GiB"]
