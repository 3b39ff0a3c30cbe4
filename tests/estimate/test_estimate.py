"""Estimates against what the real engines allocate, store and send, on torch's fake process group."""

import contextlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from hf_sdp import SDPConfig, make_plan
from hf_sdp.bench.fake_world import fake_world, parallelize
from hf_sdp.bench.predicted import predicted_step
from hf_sdp.engine.fsdp import fsdp_modules
from hf_sdp.engine.metrics import measured_peak, state_bytes
from hf_sdp.engine.shard import kept_gathered, shard
from hf_sdp.engine.sharded import find_sharded
from hf_sdp.estimate.groups import stored_groups
from hf_sdp.estimate.memory import Action, Step, _stream, fsdp_step, sdp_step
from hf_sdp.estimate.shapes import shapes_of
from hf_sdp.estimate.time import step_time
from hf_sdp.estimate.trace import Segment, _trace_stream, trace, trace_subnetwork
from hf_sdp.families.meta_model import meta_model
from hf_sdp.model.state import get_state
from hf_sdp.patch import patch_meta_model
from hf_sdp.plan.groups import shardable_modules
from hf_sdp.workload import Workload
from tests.support.estimates import compare
from tests.support.models import SMALL, tiny_config

CPU = torch.device("cpu")
BATCH = (2, 128)


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
        (SDPConfig(level="neuron", coverage=0.75), "float32", False, 2, 4, dict(model_type="qwen3")),
        (SDPConfig(level="block"), "float32", False, 1, 4, dict(model_type="starcoder2")),
    ],
    ids=[
        "ddp",
        "fsdp2",
        "bf16",
        "block",
        "recompute",
        "3 parts",
        "replicated",
        "replicas",
        "backward",
        "qwen3",
        "starcoder2",
    ],  # fmt: skip
)
def test_predicted_equals_measured(engine, dtype, checkpointing, rank, world_size, changes):
    """State and traffic to the byte, the peak within 1%."""
    config = tiny_config(**SMALL, **{"num_key_value_heads": 4, **changes})
    workload = Workload(
        batch=BATCH[0], sequence=BATCH[1], dtype=dtype, gradient_checkpointing=checkpointing, optimizer="adamw"
    )
    step = predicted_step(config, engine, workload, world_size, rank)
    compare(step, AutoModelForCausalLM.from_config(config), engine, workload, world_size, rank)


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
def test_groups_are_what_fsdp2_shards_together(config, changes):
    """The plan's groups, as the estimate counts them: FSDP2 has the same parameters, members and bytes in each."""
    model_config = tiny_config(**changes)
    with fake_world(4, rank=1):
        model = patch_meta_model(meta_model(model_config), config, rank=None, world_size=None)
        shard(model, torch.device("cpu"))
        held = get_state(model).held
        names = {id(p): name for name, p in find_sharded(model).parameters.items()}
        states = {module._get_fsdp_state(): None for module in fsdp_modules(model)}  # modules of a group share one
        made = [group for state in states for group in state._fsdp_param_groups]
        expected = sorted(
            (
                sorted(names[id(p.sharded_param)] for p in group.fsdp_params),
                group.mesh_info.shard_mesh_size,
                sum(p.padded_sharded_param_size.numel() for p in group.fsdp_params),
                sum(p.sharded_size.numel() for p in group.fsdp_params),
            )
            for group in made
        )
    found = sorted(
        (sorted(group.group.tensors), group.members, group.shard_numel, group.stored_numel)
        for group in stored_groups(held.groups, held.placement, rank=1)
    )
    assert found == [entry for entry in expected if entry[0]]


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
        held = get_state(model).held
        watched = shardable_modules(held.subnetwork, held.structure)
        composed = _stream(
            shapes_of(config).structure, *trace_subnetwork(shapes_of(config), workload, plan, subnetwork)
        )
        assert peak(item for item, _ in composed) == peak(_trace_stream(model, workload, watched))


def test_memory_grows_with_coverage_and_shrinks_with_sharding():
    config = tiny_config(**SMALL, num_key_value_heads=8)
    workload = Workload(batch=2, sequence=128)
    plans = {c: make_plan(config, SDPConfig(level="neuron", coverage=c), 4) for c in (0.25, 0.5, 1.0)}
    peaks = [sdp_step(config, plan, 0, workload).memory.peak for plan in plans.values()]
    assert peaks == sorted(peaks) and len(set(peaks)) == 3
    of = {
        name: sdp_step(config, plans[0.5], 0, workload, **sharding).memory
        for name, sharding in (
            ("full", {}),
            ("reshard", dict(reshard_after_forward=True)),
            ("none", dict(sharding="none")),
        )
    }
    assert of["reshard"].peak < of["full"].peak < of["none"].peak
    assert of["none"].parameters == plans[0.5].numel(0) * 4


@pytest.mark.parametrize("reshards", [False, True])
def test_a_micro_batch_in_pieces_computes_as_much_in_less_memory(reshards):
    config = tiny_config(**SMALL, num_key_value_heads=8)
    plan = make_plan(config, SDPConfig(level="neuron"), 4)

    def step(batch: int, pieces: int) -> Step:
        workload = Workload(batch=batch, sequence=128)
        return sdp_step(config, plan, 0, workload, reshard_after_forward=reshards, pieces=pieces)

    whole, parted, piece = step(4, 1), step(2, 2), step(2, 1)
    assert parted.flops == pytest.approx(whole.flops, rel=1e-3)  # the angles of positions are computed again
    assert piece.memory.peak < parted.memory.peak <= piece.memory.peak + piece.memory.gradients < whole.memory.peak
    reduced = sum(action.amount for action in piece.actions if action.kind == "reduce")
    assert parted.bytes_sent == piece.bytes_sent + (piece.bytes_sent if reshards else reduced)


@pytest.mark.parametrize("reshards", [False, True])
def test_the_memory_of_pieces_is_what_is_predicted(reshards):
    """The state to the byte. Without resharding the second piece gathers nothing, and has no buffers of it."""
    config = tiny_config(**SMALL, num_key_value_heads=8)
    sdp, workload = SDPConfig(coverage=1.0, reshard_after_forward=reshards), Workload(batch=2, sequence=64)
    plan = make_plan(config, sdp, 4)
    predicted = sdp_step(config, plan, 0, workload, reshard_after_forward=reshards, pieces=2).memory
    with fake_world(4):
        model, optimizer = parallelize(AutoModelForCausalLM.from_config(config), sdp, CPU)

        def step() -> None:
            for goes_on in (True, False):
                ids = torch.zeros(workload.batch, workload.sequence, dtype=torch.long)
                with kept_gathered(model) if goes_on else contextlib.nullcontext():
                    model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        step()
        stored = state_bytes(model, optimizer)
        with measured_peak(CPU) as above:
            step()
    assert (stored["parameters"], stored["optimizer"]) == (predicted.parameters, predicted.optimizer)
    peak = stored["parameters"] + stored["optimizer"] + above[0]
    assert peak <= 1.01 * predicted.peak and predicted.peak < (1.01 if reshards else 1.06) * peak


def rotary_flops(config, sequence: int) -> int:
    """Once a step. Earlier versions of transformers compute the angles with a matrix product."""
    module = meta_model(config).model.rotary_emb
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, sequence, config.hidden_size, device="meta"), torch.arange(sequence, device="meta")[None])
    return counter.get_total_flops()


def test_flops_are_six_per_weight_and_token_and_the_attention():
    """Kaplan et al.: 2 forward, 4 backward; attention: 2 products forward, 5 backward, of all scores."""
    config = tiny_config(**SMALL, num_key_value_heads=8, num_hidden_layers=2)
    workload = Workload(batch=2, sequence=64)
    flops = fsdp_step(config, workload, 4).flops
    weights = sum(p.numel() for n, p in meta_model(config).named_parameters() if p.dim() == 2 and "embed" not in n)
    attention = 2 * workload.batch * workload.sequence**2 * config.hidden_size * config.num_hidden_layers
    assert flops == 6 * weights * workload.tokens + 7 * attention + rotary_flops(config, workload.sequence)
    layers, _ = trace(shapes_of(config), workload)
    assert layers[0] is layers[1]  # traced once


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
