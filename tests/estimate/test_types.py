"""Estimates of model types of other structures than Llama's, against what real engines allocate, send and compute."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from hf_sdp import SDPConfig, SDPConfigError, make_plan
from hf_sdp.bench.fake_world import fake_world, measure_steps, parallelize
from hf_sdp.bench.support.models import made
from hf_sdp.bench.support.tiny import tiny_config
from hf_sdp.estimate.batch import training_batch
from hf_sdp.estimate.memory import fsdp_step, sdp_step
from hf_sdp.families.attention import set_attention
from hf_sdp.workload import Workload
from tests.support import types
from tests.support.types import BLOCK

IMAGES = {name: dict(task="image classification", model_type=name) for name in ("vit", "resnet", "swin")}
WIDE = "resnet of many channels"
MODELS = types.MODELS | IMAGES | {WIDE: IMAGES["resnet"]}
CPU, BATCH, WORLD = torch.device("cpu"), (2, 128), 4
SIZES = dict(
    vocab_size=512, hidden_size=128, intermediate_size=256, ffn_dim=256, n_inner=256, max_position_embeddings=256,
    word_embed_proj_dim=128, n_embd=128, n_positions=256, d_model=128, d_ff=256, encoder_ffn_dim=256,
    decoder_ffn_dim=256, max_target_positions=256, image_size=128, use_cache=False,
)  # fmt: skip
"""Under whatever name. Memory is more than what an allocator rounds up."""
SHORT = ("gpt2", "gemma2", "mixtral", "bart")
LONG = (
    "bert", "opt", "phi3", "gpt_neox", "qwen3_moe", "gemma3_text", "olmo2", "falcon", "modernbert", "t5", "whisper"
)  # fmt: skip
TYPES = [*SHORT, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]


def config_of(name: str) -> PreTrainedConfig:
    options = MODELS[name]
    known = tiny_config(options["model_type"]).to_dict()
    sizes = {key: value for key, value in SIZES.items() if key in known}
    sizes |= dict(embedding_size=64, hidden_sizes=[64, 256], image_size=32) if name == WIDE else {}
    config = tiny_config(options["model_type"], **sizes)
    return made_of(config, name).config


def made_of(config: PreTrainedConfig, name: str):
    model = made(config, MODELS[name]["task"]).float()
    model.config.architectures = [type(model).__name__]
    return model


ENGINES = {"FSDP2": None, "SDP, blocks": SDPConfig(**BLOCK), "SDP, neurons": SDPConfig(coverage=0.5)}
UNEVEN: dict[str, SDPConfig | None] = {  # three of four workers hold a unit, three of four parts
    "SDP, blocks": SDPConfig(**BLOCK | dict(coverage=0.75)),
    "SDP, neurons": SDPConfig(coverage=0.75, reshard_after_forward=True),
    "SDP, backward": SDPConfig(coverage=0.5, masking="backward", reshard_after_forward=True),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", TYPES)
def test_memory_and_traffic_are_those_of_a_step(name, engine):
    """State and traffic to the byte, the peak within 2%."""
    compare(name, ENGINES[engine])


def compare(name: str, sdp: SDPConfig | None) -> None:
    config, workload = config_of(name), Workload(batch=BATCH[0], sequence=BATCH[1])
    if sdp is not None:
        plan, reshards = make_plan(config, sdp, WORLD), sdp.reshard_after_forward
        step = sdp_step(config, plan, 1, workload, reshard_after_forward=reshards)
    else:
        step = fsdp_step(config, workload, WORLD)
    full = made_of(config, name)
    batches = {shape: training_batch(full, *shape, CPU) for shape in (BATCH, (1, 16))}
    with fake_world(WORLD, 1):
        model, optimizer = parallelize(full, sdp or "FSDP2", CPU)
        (measured,) = measure_steps(model, optimizer, [BATCH], CPU, batch_of=lambda *shape: batches[shape])
    memory = step.memory
    assert (memory.parameters, memory.gradients, memory.optimizer) == tuple(
        measured[kind] for kind in ("parameters", "gradients", "optimizer")
    )
    assert memory.peak == pytest.approx(measured["parameters"] + measured["optimizer"] + measured["step"], rel=0.02)
    if sdp is not None:
        assert step.bytes_sent == measured["bytes_sent"]


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "FSDP2"])  # of the first worker: it has most
@pytest.mark.parametrize("name", ["vit", "resnet", "swin"])
def test_of_images_too(name, engine):
    compare(name, ENGINES[engine])


@pytest.mark.parametrize("engine", ["FSDP2", *UNEVEN])
def test_of_weights_that_take_more_than_activations(engine):
    """Copies of convolutions' weights, and padded ones of gradients."""
    compare(WIDE, UNEVEN.get(engine))


def test_what_a_model_says_of_its_config_is_told():
    config = config_of("t5")
    del config.decoder_start_token_id
    with pytest.raises(SDPConfigError, match="T5ForConditionalGeneration cannot be estimated.*decoder_start_token_id"):
        fsdp_step(config, Workload(batch=1, sequence=16), WORLD)


@pytest.mark.parametrize("name", TYPES)
def test_flops_are_those_of_a_step(name):
    """Within 2%: attention in one kernel computes its scores again in backward."""
    config = config_of(name)
    step = fsdp_step(config, Workload(batch=2, sequence=16), WORLD)
    model = made_of(config, name).train()
    set_attention(model, "eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    inputs = training_batch(model, 2, 16, CPU)
    with FlopCounterMode(display=False) as counter:
        model(**inputs).loss.backward()
    assert step.flops == pytest.approx(counter.get_total_flops(), rel=0.02)
