"""The command hf-sdp: what it prints, what it refuses, and how."""

import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib

import pytest
import torch
from models import batch, tiny_config, tiny_model
from workers import run_workers

from hf_sdp import SDPAccelerator, SDPConfig, Workload, make_plan, patch_model
from hf_sdp.checkpoint.folder import MARKER, PLAN, _fingerprint
from hf_sdp.cli import SHORT_HELPS, commands, main
from hf_sdp.cli.tables import short, short_bytes


@pytest.fixture
def run(capsys):
    """``run("plan", ...)`` -> exit code, stdout, stderr."""

    def call(*arguments):
        code = 0
        try:
            main([str(a) for a in arguments])
        except SystemExit as ended:
            code = ended.code
        return (code, *capsys.readouterr())

    return call


@pytest.fixture
def tiny(tmp_path):
    tiny_config().save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


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
    "unsupported family": ('{"model_type": "gpt2"}', "Unknown model family: model_type='gpt2'.*Supported"),
    "unknown model_type": ('{"model_type": "nonsense"}', "config.json cannot be read.*nonsense"),
    "no model_type": ("{}", "config.json cannot be read"),
    "no JSON": ("hello", "config.json cannot be read.*not a valid JSON"),
    "negative size": (llama(hidden_size=-32), "No model can be made of the config.*negative"),
    "text for a number": (llama(hidden_size="wide"), "config.json cannot be read.*hidden_size"),
    "no layers": (llama(num_hidden_layers=0), "Nothing in LlamaForCausalLM"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_refused_in_one_line(run, tmp_path, case):
    content, message = BAD_CONFIGS[case]
    (tmp_path / "config.json").write_text(content)
    refused(run("plan", tmp_path), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "Missing argument 'MODEL'"),
        (["plan", ""], "MODEL is empty"),
        (["plan", "/no/such/folder"], "There is no folder or file /no/such/folder"),
        (["plan", "no_such.json"], "There is no folder or file no_such.json"),
        (["plan", "a/b/c"], "'a/b/c' is no named size .llama-134m.*from the hub"),
        (["plan", os.path.dirname(__file__)], "has no config.json"),
        (["plan", "llama-134m", "--workers", "-8"], "-8 is not in the range"),
        (["plan", "llama-134m", "--coverage", "-0.5"], r"coverage must be in \(0, 1\]"),
        (["plan", "llama-134m", "--coverage", "half"], "'half' is no list of numbers"),
        (["plan", "llama-134m", "--coverage", "0.3"], "Nearest coverage that can be met: 0.25"),
        (["plan", "llama-134m", "--seq", "-1"], "-1 is not in the range"),
        (["plan", "llama-134m", "--memory-gib", "-1"], "memory_gib must list a positive number"),
        (["plan", "llama-134m", "--num-subnetworks", "3"], "--num-subnetworks 3 does not divide --workers 8"),
        (["plan", "llama-134m", "--batch", "4"], "--batch has no effect without --memory-gib"),
        (
            ["plan", "llama-134m", "--sharding", "none", "--reshard-after-forward"],
            "reshard_after_forward=True has no effect",
        ),
        (["plan", "llama-134m", "--picture", "plan.gif"], "must end in one of .png, .svg"),
        (["plan", "llama-134m", "--picture", "/no/such/plan.png"], "there is no folder /no/such"),
        (["plan", "llama-134m", "--picture", "/proc/plan.png"], "--picture /proc/plan.png cannot be written"),
        (["plan", "llama-134m", "--unknown"], "No such option '--unknown'"),
        (["unknown"], "No such command 'unknown'"),
        (["verify"], "Missing argument 'FOLDER'"),
        (["verify", "/no/such/folder"], "/no/such/folder is no folder"),
        (["verify", os.path.dirname(__file__)], "is no checkpoint: it has no config.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_one_line_and_exit_code_2(run, arguments, message):
    refused(run(*arguments), message)


def refused(result: tuple[int, str, str], message: str) -> None:
    code, out, err = result
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("hf-sdp: ")
    assert re.search(message, err), err


def test_without_network_the_hub_is_asked_once(run, monkeypatch, caplog):
    """By default transformers and huggingface_hub would ask six times, wait in between and warn each time."""
    asked = []

    def no_network(*arguments, **options):
        asked.append(arguments)
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr("hf_sdp.cli.models.get_hf_file_metadata", no_network)
    refused(run("plan", "some/model"), "'some/model' is no named size.*from the hub: .*Name or service not known")
    assert len(asked) == 1 and not caplog.records


def test_module_and_script_are_the_same_command(run, tmp_path, monkeypatch, capsys):
    arguments = ["plan", "no/such-model"]
    here = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(__file__)), "HF_HUB_OFFLINE": "1"}
    module = subprocess.run(
        [sys.executable, "-m", "hf_sdp", *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        env=here,
    )
    assert module.returncode == 2 and module.stdout == ""
    assert module.stderr.count("\n") == 1 and "'no/such-model' is no named size" in module.stderr
    with open(os.path.join(os.path.dirname(os.path.dirname(__file__)), "pyproject.toml"), "rb") as file:
        assert tomllib.load(file)["project"]["scripts"] == {"hf-sdp": "hf_sdp.cli:main"}
    for bare in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["/some/where/hf-sdp", *bare])
        main()  # as the installed script calls it
        by_script = capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["/some/where/hf_sdp/__main__.py", *bare])
        runpy.run_module("hf_sdp", run_name="__main__")
        assert capsys.readouterr() == by_script
        assert "verify" in by_script.out and by_script.err == ""


def test_help_names_every_option(run):
    code, out, _ = run("plan", "--help")
    assert code == 0
    for option in ("--workers", "--level", "--coverage", "--picture", "--seq", "--json", "--memory-gib"):
        assert option in out


@pytest.mark.parametrize("name", SHORT_HELPS)
def test_the_short_help_is_the_first_sentence_of_the_long_one(run, name):
    first = re.match(r".*?\.(?=\s|$)", commands.get_command(None, name).help, re.DOTALL)[0]
    assert SHORT_HELPS[name] == " ".join(first.split())
    shown = " ".join(run("--help")[1].split())
    assert f"{name} {SHORT_HELPS[name]}" in shown


def imported_by(program: str, *modules: str) -> set[str]:
    """Which of the modules a new process has imported after a program."""
    program += "\nimport json, sys\nprint(json.dumps([*sys.modules]), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return set(modules) & set(json.loads(done.stderr.splitlines()[-1]))


HEAVY = ("torch", "transformers", "numpy", "networkx", "rich", "matplotlib", "datasets", "accelerate")


@pytest.mark.parametrize(
    "program",
    [
        "import hf_sdp, hf_sdp.cli, hf_sdp.cli.options",
        "from hf_sdp import SDPConfig, SDPConfigError, Workload",
        "from hf_sdp.cli import main; main(['--help'])",
    ],
)
def test_what_needs_no_model_imports_nothing_heavy(program):
    assert imported_by(program, "hf_sdp", *HEAVY) == {"hf_sdp"}


def test_a_plan_without_picture_imports_no_tool_of_another_room():
    """accelerate is not among them: transformers imports it."""
    rooms = ("hf_sdp.bench", "hf_sdp.hosts", "hf_sdp.engine", "hf_sdp.checkpoint")
    tools = ("matplotlib", "datasets", "pandas", "scipy", "sklearn", "torchvision")
    program = "from hf_sdp.cli import main; main(['plan', 'llama-134m', '--json'])"
    assert imported_by(program, "torch", *rooms, *tools) == {"torch"}


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


def test_short_numbers():
    assert [short(v) for v in (0, 999, 1000, 67_108_864, 6.74e9)] == ["0", "999", "1 k", "67.1 M", "6.74 G"]
    assert [short_bytes(v) for v in (0, 1023, 1024, 1.5 * 2**30)] == ["0 B", "1023 B", "1 KiB", "1.5 GiB"]


def save_checkpoint(folder):
    accelerator = SDPAccelerator()
    model = patch_model(tiny_model(), SDPConfig(coverage=0.5))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    accelerator.backward(model(**batch(accelerator.process_index)).loss)
    optimizer.step()
    accelerator.save_state(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "state"
    run_workers(save_checkpoint, folder, world_size=2)
    return folder


@pytest.fixture
def checkpoint(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "state")


def test_a_checkpoint_without_fault(run, saved):
    code, out, err = run("verify", saved)
    assert (code, err) == (0, "")
    for text in (
        "no fault found",
        "2 workers",
        "sizes and CRC-32 as written",
        "LlamaForCausalLM",
        "2 subnetworks",
        "exp_avg",
    ):
        assert text in out
    code, out, _ = run("verify", saved, "--no-contents")
    assert code == 0 and "contents not compared" in out


def test_a_standard_folder_is_checked_as_far_as_it_can_be(run, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    code, out, _ = run("verify", tmp_path)
    assert code == 0 and "not hf_sdp" in out and "in the shapes of config.json" in out
    first = sorted(tmp_path.glob("model-*.safetensors"))[0]
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    refused(run("verify", tmp_path), f"{first.name} is missing, cut short")
    first.unlink()
    refused(run("verify", tmp_path), f"{first.name} is missing")
    first.write_bytes(content)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused(run("verify", tmp_path), "model.safetensors.index.json cannot be read")


def sealed_again(folder, file: str, edit):
    """Change a file and its entry in the marker: a folder that fits its hashes, and not itself."""
    (folder / file).write_text(edit((folder / file).read_text()))
    marker = json.loads((folder / MARKER).read_text())
    if file != MARKER:
        marker["files"][file] = _fingerprint(folder / file)
        (folder / MARKER).write_text(json.dumps(marker))


def edited(change):
    def edit(text: str) -> str:
        content = json.loads(text)
        change(content)
        return json.dumps(content)

    return edit


def test_damaged_files_are_named(run, checkpoint):
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    refused(run("verify", checkpoint), "damaged: the content of model.safetensors has changed")
    assert run("verify", checkpoint, "--no-contents")[0] == 0
    weights.write_bytes(content[:-1])
    refused(run("verify", checkpoint, "--no-contents"), "damaged: model.safetensors has .* bytes")
    weights.unlink()
    refused(run("verify", checkpoint), "incomplete: model.safetensors is missing")
    (checkpoint / MARKER).unlink()
    refused(run("verify", checkpoint), f"incomplete: it has no {MARKER}")


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (PLAN, lambda c: c.update(level="block"), f"{PLAN}: plan_hash is .* {MARKER} says"),
        (PLAN, lambda c: c.pop("shapes"), f"{PLAN} cannot be read as a plan: KeyError"),
        (
            "config.json",
            lambda c: c.update(intermediate_size=128),
            r"gate_proj.weight has shape \(64, 32\), the model needs",
        ),
        ("config.json", lambda c: c.update(num_hidden_layers=3), f"{PLAN}: model.layers.3.* has None"),
        ("config.json", lambda c: c.update(num_hidden_layers=5), "model.layers.4.* is missing, the model needs"),
        ("config.json", lambda c: c.update(hidden_size=-32), "config.json: no model can be made of it"),
        (MARKER, lambda c: c["sdp_config"].update(level="block"), "level is neuron.*says block"),
        (MARKER, lambda c: c.update(world_size=4), "num_subnetworks is 2.*says 4"),
        (MARKER, lambda c: c.pop("versions"), f"{MARKER} is damaged: KeyError"),
        (MARKER, lambda c: c.update(files=[]), f"{MARKER} is damaged"),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_named(run, checkpoint, file, change, message):
    sealed_again(checkpoint, file, edited(change))
    refused(run("verify", checkpoint), message)


def test_a_damaged_index_of_the_optimizer_is_named(run, checkpoint):
    metadata = checkpoint / "sdp_optimizer" / "tensors" / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-20])
    refused(run("verify", checkpoint), r"damaged: sdp_optimizer/tensors/.metadata has")
    marker = json.loads((checkpoint / MARKER).read_text())
    marker["files"]["sdp_optimizer/tensors/.metadata"] = _fingerprint(metadata)
    (checkpoint / MARKER).write_text(json.dumps(marker))
    refused(run("verify", checkpoint), r"sdp_optimizer/tensors/.metadata cannot be read")
