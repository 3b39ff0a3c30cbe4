"""Estimates of model types of other structures than Llama's, against what real engines allocate, send and compute."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from hf_sdp import SDPConfig, SDPConfigError, make_plan
from hf_sdp.bench.fake_world import fake_world, measure_steps, parallelize
from hf_sdp.bench.support.models import made
from hf_sdp.bench.support.tiny import tiny_config
from hf_sdp.estimate.memory import fsdp_step, sdp_step
from hf_sdp.workload import Workload
from tests.support.types import BLOCK, MODELS

CPU, BATCH, WORLD = torch.device("cpu"), (2, 128), 4
SIZES = dict(
    vocab_size=512, hidden_size=128, intermediate_size=256, ffn_dim=256, n_inner=256, max_position_embeddings=256,
    word_embed_proj_dim=128, n_embd=128, n_positions=256, use_cache=False,
)  # fmt: skip
"""Under whatever name. Memory is more than what an allocator rounds up."""
SHORT = ("gpt2", "gemma2", "mixtral")
OF_ONE_STACK = [
    pytest.param(name, marks=() if name in SHORT else pytest.mark.long)
    for name in (*SHORT, "bert", "opt", "phi3", "gpt_neox", "qwen3_moe", "gemma3_text", "olmo2", "falcon", "modernbert")
]


def config_of(name: str) -> PreTrainedConfig:
    options = MODELS[name]
    known = tiny_config(options["model_type"]).to_dict()
    config = tiny_config(options["model_type"], **{key: value for key, value in SIZES.items() if key in known})
    return made_of(config, name).config


def made_of(config: PreTrainedConfig, name: str):
    model = made(config, MODELS[name]["task"]).float()
    model.config.architectures = [type(model).__name__]
    return model


ENGINES = {"FSDP2": None, "SDP, blocks": SDPConfig(**BLOCK), "SDP, neurons": SDPConfig(coverage=0.5)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", OF_ONE_STACK)
def test_memory_and_traffic_are_those_of_a_step(name, engine):
    """State and traffic to the byte, the peak within 2%."""
    config, workload = config_of(name), Workload(batch=BATCH[0], sequence=BATCH[1])
    sdp = ENGINES[engine]
    if sdp is not None:
        step = sdp_step(config, make_plan(config, sdp, WORLD), 1, workload)
    else:
        step = fsdp_step(config, workload, WORLD)
    with fake_world(WORLD, 1):
        model, optimizer = parallelize(made_of(config, name), sdp or engine, CPU)
        (measured,) = measure_steps(model, optimizer, [BATCH], CPU)
    memory = step.memory
    assert (memory.parameters, memory.gradients, memory.optimizer) == tuple(
        measured[kind] for kind in ("parameters", "gradients", "optimizer")
    )
    assert memory.peak == pytest.approx(measured["parameters"] + measured["optimizer"] + measured["step"], rel=0.02)
    if sdp is not None:
        assert step.bytes_sent == measured["bytes_sent"]


@pytest.mark.parametrize("name", OF_ONE_STACK)
def test_flops_are_those_of_a_step(name):
    """Within 2%: attention in one kernel computes its scores again in backward."""
    config = config_of(name)
    step = fsdp_step(config, Workload(batch=2, sequence=16), WORLD)
    model = made_of(config, name).train()
    model.set_attn_implementation("eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    ids = torch.zeros(2, 16, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    assert step.flops == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_two_stacks_are_refused_and_the_plan_is_named(name):
    with pytest.raises(SDPConfigError, match="2 stacks of layers.*hf-sdp plan"):
        fsdp_step(config_of(name), Workload(batch=1, sequence=16), WORLD)
