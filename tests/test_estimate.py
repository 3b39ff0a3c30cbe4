"""Estimates against what the real engines allocate, store and send, on torch's fake process group."""

import contextlib
import json
import resource

import pytest
import torch
from models import tiny_config
from transformers import LlamaForCausalLM

from hf_sdp import SDPConfig, make_plan
from hf_sdp.bench.fake_world import fake_world, measure_steps, parallelize
from hf_sdp.cli import main
from hf_sdp.engine.shard import _sharding_groups
from hf_sdp.estimate.groups import sdp_groups, skeleton
from hf_sdp.estimate.memory import Action, Step, _stream, fsdp_step, replicated_step, sdp_step, worker_memory
from hf_sdp.estimate.time import step_time
from hf_sdp.estimate.trace import Segment, _trace_stream, trace, trace_subnetwork
from hf_sdp.families.meta_model import meta_model
from hf_sdp.model.state import get_state
from hf_sdp.patch import patch_meta_model
from hf_sdp.workload import Workload

CPU = torch.device("cpu")
SMALL = dict(vocab_size=512, hidden_size=128, intermediate_size=256, num_attention_heads=8, use_cache=False)
BATCH = (2, 128)


def predicted(config, engine, workload, world_size, rank) -> Step:
    if engine == "DDP":
        return replicated_step(config, workload, world_size, zero_stage=0)
    if isinstance(engine, str):
        return fsdp_step(config, workload, world_size, reshard_after_forward=engine == "FSDP2")
    num_subnetworks = engine.num_subnetworks or world_size
    return sdp_step(
        config,
        make_plan(config, engine, num_subnetworks),
        rank % num_subnetworks,
        workload,
        sharding=engine.sharding,
        reshard_after_forward=engine.reshard_after_forward,
        world_size=world_size,
    )


@pytest.mark.parametrize(
    ("engine", "dtype", "checkpointing", "rank", "world_size", "changes"),
    [
        ("DDP", "float32", False, 0, 4, {}),
        ("FSDP2", "float32", False, 0, 3, {}),
        ("FSDP2, no reshard", "bfloat16", False, 0, 4, {}),
        (SDPConfig(level="block"), "float32", False, 1, 4, {}),
        (SDPConfig(level="block", reshard_after_forward=True), "float32", True, 0, 4, {}),
        (SDPConfig(level="neuron", coverage=0.75), "float32", False, 2, 4, dict(mlp_bias=True, attention_bias=True)),
        (SDPConfig(level="neuron", sharding="none"), "float32", False, 0, 4, dict(tie_word_embeddings=True)),
        (SDPConfig(level="neuron", num_subnetworks=2, param_dtype="bfloat16"), "bfloat16", False, 3, 4, {}),
        (SDPConfig(level="block", masking="backward", reshard_after_forward=True), "float32", False, 0, 4, {}),
    ],
    ids=["ddp", "fsdp2", "bf16", "block", "recompute", "3 parts", "replicated", "replicas", "backward"],
)
def test_predicted_equals_measured(engine, dtype, checkpointing, rank, world_size, changes):
    """State and traffic to the byte, the peak within 1%."""
    config = tiny_config(**SMALL, **{"num_key_value_heads": 4, **changes})
    workload = Workload(
        batch=BATCH[0], sequence=BATCH[1], dtype=dtype, gradient_checkpointing=checkpointing, optimizer="adamw"
    )
    step = predicted(config, engine, workload, world_size, rank)
    model = LlamaForCausalLM(config)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with fake_world(world_size, rank):
        model, optimizer = parallelize(model, engine, CPU, None if dtype == "float32" else dtype)
        (measured,) = measure_steps(model, optimizer, [BATCH], CPU)
    memory = step.memory
    assert (memory.parameters, memory.gradients, memory.optimizer) == tuple(
        measured[kind] for kind in ("parameters", "gradients", "optimizer")
    )
    peak = measured["parameters"] + measured["optimizer"] + measured["buckets"] + measured["step"]
    assert memory.peak == pytest.approx(peak, rel=0.01)
    parts = (
        memory.parameters,
        memory.optimizer,
        memory.gathered_at_peak,
        memory.activations_at_peak,
        memory.gradients_at_peak,
    )
    assert memory.peak == sum(parts)
    if isinstance(engine, SDPConfig):
        assert step.bytes_sent == measured["bytes_sent"]


@pytest.mark.parametrize("changes", [{}, dict(tie_word_embeddings=True, mlp_bias=True, attention_bias=True)], ids=str)
@pytest.mark.parametrize(
    "config",
    [
        SDPConfig(level="neuron", coverage=0.75),
        SDPConfig(level="neuron", coverage=1.0),
        SDPConfig(level="block"),
        SDPConfig(level="block", block_granularity="layer"),
        SDPConfig(level="neuron", masking="backward"),
    ],
    ids=str,
)
def test_groups_are_the_engines(config, changes):
    """The same parameters under the same names and in the same shapes as the engine shards together."""
    model_config = tiny_config(**changes)
    plan = make_plan(model_config, config, 4)
    model = patch_meta_model(meta_model(model_config), config, rank=1, world_size=4)
    names = {module: name for name, module in model.named_modules()}
    expected, taken = [], set()
    for modules, holders in _sharding_groups(model, get_state(model)):
        parameters = {
            p: f"{names[module]}.{name}".removeprefix(".")
            for module in modules
            for name, p in module.named_parameters()
            if p not in taken
        }
        taken |= set(parameters)
        shapes = {name: tuple(p.shape) for p, name in parameters.items()}
        expected.append((len(holders), {names[module] for module in modules}, sorted(shapes.values())))
    found = [
        (group.members, set(group.modules), sorted(group.shapes.values()))
        for group in sdp_groups(plan, 1, skeleton(model_config), 4, "full")
    ]
    key = lambda group: (sorted(group[1]), group[0])  # noqa: E731
    assert sorted(found, key=key) == sorted(expected, key=key)


def test_a_deep_model_is_put_together_from_shallow_traces():
    """A worker's blocks in any order: the peak of the composed step is that of the deep model traced as a whole."""
    config = tiny_config(**SMALL, num_hidden_layers=6, num_key_value_heads=4)
    workload = Workload(batch=2, sequence=64)
    sdp = SDPConfig(level="block")
    plan = make_plan(config, sdp, 8)

    def peak(stream) -> int:
        live = highest = 0
        for item in stream:
            if isinstance(item, Segment):
                highest = max(highest, live + item.peak)
                live += item.delta + sum(item.gradients.values())
        return highest

    for subnetwork in range(0, 8, 3):
        model = patch_meta_model(meta_model(config), sdp, rank=subnetwork, world_size=8)
        composed = _stream(skeleton(config), *trace_subnetwork(config, workload, plan, subnetwork))
        assert peak(item for item, _ in composed) == peak(_trace_stream(model, workload))


def test_memory_grows_with_coverage_and_shrinks_with_sharding():
    config = tiny_config(**SMALL, num_key_value_heads=8)
    workload = Workload(batch=2, sequence=128)
    plans = {c: make_plan(config, SDPConfig(level="neuron", coverage=c), 4) for c in (0.25, 0.5, 1.0)}
    peaks = [worker_memory(config, plan, 0, workload).peak for plan in plans.values()]
    assert peaks == sorted(peaks) and len(set(peaks)) == 3
    of = {
        name: worker_memory(config, plans[0.5], 0, workload, **sharding)
        for name, sharding in (
            ("full", {}),
            ("reshard", dict(reshard_after_forward=True)),
            ("none", dict(sharding="none")),
        )
    }
    assert of["reshard"].peak < of["full"].peak < of["none"].peak
    assert of["none"].parameters == plans[0.5].numel(0) * 4


def test_flops_are_six_per_weight_and_token_and_the_attention():
    """Kaplan et al.: 2 forward, 4 backward; attention: 2 products forward, 5 backward, of all scores."""
    config = tiny_config(**SMALL, num_key_value_heads=8, num_hidden_layers=2)
    workload = Workload(batch=2, sequence=64)
    flops = fsdp_step(config, workload, 4).flops
    weights = sum(p.numel() for n, p in meta_model(config).named_parameters() if p.dim() == 2 and "embed" not in n)
    attention = 2 * workload.batch * workload.sequence**2 * config.hidden_size * config.num_hidden_layers
    assert flops == 6 * weights * workload.tokens + 7 * attention
    assert trace(config, workload)[0] is trace(config, workload)[1]  # traced once


def test_step_time_of_two_queues():
    step = Step(
        None,
        (
            Action("gather", 10, 0),  # 0 to 10 s
            Action("wait", group=0),
            Action("compute", 5),  # 10 to 15 s
            Action("reduce", 20),  # 15 to 35 s, beside
            Action("compute", 30),  # 15 to 45 s
            Action("reduce", 4),  # 45 to 49 s
        ),
    )
    time = step_time(step, bandwidth=1, flops=1)
    assert (time.compute, time.communication, time.exposed, time.total) == (35, 34, 14, 49)
    assert step_time(step, bandwidth=1e12, flops=1).total == pytest.approx(35)


def run(capsys, *arguments) -> str:
    """What ``hf-sdp estimate`` prints when all is well."""
    with contextlib.suppress(SystemExit):
        main(["estimate", *map(str, arguments)])
    printed = capsys.readouterr()
    assert printed.out, printed.err
    return printed.out


def test_command_as_table_and_json(capsys, tmp_path):
    tiny_config(**SMALL, num_key_value_heads=4).save_pretrained(tmp_path)
    arguments = ["--workers", "4", "--level", "block", "--batch", "2", "--seq", "64"]
    assert "SDP, sharding none" in run(capsys, tmp_path, *arguments)
    arguments += ["--bandwidth", "1Gbit", "--flops", "1TFLOPS", "--json"]
    engines = {e["engine"]: e for e in json.loads(run(capsys, tmp_path, *arguments))["engines"]}
    assert len(engines) == 9
    ddp, full, none = (engines[name] for name in ("DDP", "SDP, sharding full", "SDP, sharding none"))
    assert full["peak_bytes"]["max"] < none["peak_bytes"]["max"] < ddp["peak_bytes"]["max"]
    assert ddp["step_time_s"]["total"] == pytest.approx(ddp["step_time_s"]["compute"] + ddp["step_time_s"]["exposed"])
    between = (full["peak_bytes"]["max"] + none["peak_bytes"]["max"]) / 2
    report = json.loads(run(capsys, tmp_path, *arguments, "--gib", between / 2**30))
    assert [e["fits"] for e in report["engines"] if e["engine"].startswith("SDP")] == [True, True, False]
    largest = report["largest_coverage_that_fits"]
    assert largest["SDP, sharding none"] == 0.25 and largest["SDP, sharding full"] >= 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        ["--bandwidth", "-1Gbit", "--flops", "1e12"],
        ["--bandwidth", "10Gfoo", "--flops", "1e12"],
        ["--bandwidth", "10Gbit"],
        ["--bandwidth", "10Gbit", "--flops", "fast"],
        ["--gib", "0"],
        ["--num-subnetworks", "3"],
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, wrong):
    with pytest.raises(SystemExit) as exited:
        main(["estimate", "llama-134m", *wrong])
    captured = capsys.readouterr()
    assert exited.value.code == 2 and captured.out == "" and len(captured.err.strip().splitlines()) == 1


def test_a_model_of_70_billion_parameters_takes_little_memory(capsys, tmp_path):
    tiny_config(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=8192,
    ).save_pretrained(tmp_path)  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = json.loads(run(capsys, tmp_path, "--level", "block", "--json"))
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert report["parameters"] > 70e9
    assert grown_kib < 300 * 1024
