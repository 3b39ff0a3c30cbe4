"""Adapters around weights in four bits (QLoRA). What else is quantized is refused."""

import pytest
import torch

from hf_sdp import SDPConfig, SDPConfigError, patch_model
from tests.support.models import tiny_model, with_adapters
from tests.support.oracle import compare
from tests.support.runs import train_resume_and_reload
from tests.support.trainer import train
from tests.support.workers import run_workers

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

MODEL = dict(lora={}, quantized=dict(bnb_4bit_quant_type="nf4"), hidden_size=64)
DOUBLY = dict(MODEL, quantized=dict(bnb_4bit_use_double_quant=True))


@pytest.mark.parametrize(
    ("config", "model"),
    [
        (dict(level="block"), MODEL),
        (dict(level="block", masking="backward"), DOUBLY),
        pytest.param(dict(level="block", sharding="none"), DOUBLY, marks=pytest.mark.long),
        pytest.param(dict(level="block", reshard_after_forward=True), MODEL, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_adapters_of_packed_weights_equal_the_oracle(config, model):
    """The packed bits, and what they mean, are rank 0's, and are put together as they were."""
    compare(config, model, steps=4, optimizer="adamw")


def test_everything_held_equals_ddp(tmp_path):
    ddp = run_workers(train, tmp_path / "ddp", None, None, MODEL, world_size=2)[0]
    sdp = run_workers(train, tmp_path / "sdp", dict(level="block", coverage=1.0), None, MODEL, world_size=2)[0]
    assert sdp[:2] == pytest.approx(ddp[:2], rel=1e-4)


def test_a_run_resumes_and_its_adapters_are_peft_s(tmp_path):
    """The full model, in evaluation, also has the packed weights of other workers."""
    (losses, norms, loss), simulated = train_resume_and_reload(tmp_path, dict(level="block"), MODEL)
    assert losses == pytest.approx(simulated[0], abs=1e-4)
    assert norms == pytest.approx(simulated[1], rel=1e-3)
    assert loss == pytest.approx(simulated[2], abs=1e-4)


def with_torchao():
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    return with_adapters(model)


REFUSED = {
    "neuron level": (MODEL, dict(level="neuron"), "Use level='block'"),
    "no adapters": ({**MODEL, "lora": None}, dict(level="block"), "do not learn. Put adapters around them"),
    "bytes": (
        {**MODEL, "quantized": dict(bnb_4bit_quant_storage=torch.uint8)},
        dict(level="block"),
        "packed in torch.uint8, which is not sharded. Load it with .*bnb_4bit_quant_storage=torch.bfloat16",
    ),
    "cast": (MODEL, dict(level="block", param_dtype="float16"), "would cast .* Use that one for both"),
    "eight bits": (
        {**MODEL, "quantized": dict(load_in_4bit=False, load_in_8bit=True)},
        dict(level="block"),
        "a layer of eight bits .* Load the model in full",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_quantized_otherwise_is_refused(case):
    model, config, reason = REFUSED[case]
    with pytest.raises(SDPConfigError, match=reason):
        patch_model(tiny_model(**model), SDPConfig(**config), rank=0, world_size=2)


def test_torchao_is_refused():
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(SDPConfigError, match=r"torchao: its tensors have parts .* Load the model in full"):
        patch_model(with_adapters(model), SDPConfig(level="block"), rank=0, world_size=2)
