"""One worker without the others on a GPU: the tool of the benchmarks measures memory and time there."""

import pytest
import torch
from transformers import LlamaForCausalLM

from hf_sdp import SDPConfig
from hf_sdp.bench.fake_world import fake_world, measure_steps, parallelize
from hf_sdp.bench.predicted import predicted_step
from hf_sdp.bench.small_llama import small_llama
from hf_sdp.workload import Workload

SIZES = dict(vocab_size=512, hidden_size=256, intermediate_size=512, num_attention_heads=8)
BATCH = (2, 128)


SDP = [SDPConfig(level="neuron", param_dtype="bfloat16"), SDPConfig(masking="backward")]


@pytest.mark.parametrize("engine", ["DDP", "FSDP2", *SDP], ids=str)
def test_state_is_what_is_predicted_and_steps_take_time(engine):
    config, device = small_llama(**SIZES), torch.device("cuda")
    with fake_world(8):
        with device:
            model = LlamaForCausalLM(config)
        model, optimizer = parallelize(model, engine, device)
        (row,) = measure_steps(model, optimizer, [BATCH], device)
    dtype = getattr(engine, "param_dtype", None) or "float32"
    memory = predicted_step(config, engine, Workload(batch=BATCH[0], sequence=BATCH[1], dtype=dtype), 8).memory
    assert row["parameters"] == memory.parameters and row["optimizer"] == memory.optimizer
    assert 0 < row["step"] and 0 < row["step_s"] < 10
