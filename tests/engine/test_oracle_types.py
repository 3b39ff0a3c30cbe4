"""Model types of all structures with real workers: training, evaluation, the checkpoint, generation."""

import pytest
import torch
import torch.distributed as dist
import transformers

import hf_sdp
from hf_sdp import SDPAccelerator, SDPConfig, patch_model
from hf_sdp.bench.support.models import TASKS
from tests.support.models import batch_for, tiny_model
from tests.support.oracle import compare
from tests.support.types import BLOCK, MODELS, NEURON, short
from tests.support.workers import run_workers


@pytest.mark.parametrize("name", short("mixtral, auxiliary loss", "t5"))
def test_workers_equal_the_oracle(name):
    compare(BLOCK, MODELS[name], accumulation=2, steps=3)


@pytest.mark.parametrize("name", short("t5", "deepseek_v3"))
def test_heads_neurons_and_experts_in_several_parts_equal_the_oracle(name):
    compare(NEURON, MODELS[name], accumulation=2, steps=3)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("changes", [dict(block_granularity="layer"), dict(sharding="none")], ids=str)
def test_variants_equal_the_oracle(name, changes):
    compare(BLOCK | changes, MODELS[name], accumulation=2, steps=3)


@pytest.mark.long
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("changes", [dict(coverage=0.5, reshard_after_forward=True), dict(masking="backward")], ids=str)
def test_variants_of_the_neuron_level_equal_the_oracle(name, changes):
    compare(NEURON | changes, MODELS[name], accumulation=2, steps=3)


@pytest.mark.long
def test_a_layer_that_adds_in_place_learns_under_backward_masking():
    compare(BLOCK | dict(masking="backward"), MODELS["falcon"], steps=2, world_size=2)


def evaluate_and_reload(name: str, config: dict, folder):
    options, sdp = MODELS[name], SDPConfig(**config)
    task, auto_class = options["task"], getattr(transformers, TASKS[options["task"]][1])
    accelerator = SDPAccelerator(cpu=True)
    model = patch_model(tiny_model(**options), sdp)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.backward(model(**batch_for(model, dist.get_rank(), task)).loss)
    optimizer.step()
    hf_sdp.verify(model)
    hf_sdp.save_pretrained(model, folder)
    inputs = batch_for(model, 9, task)
    with torch.no_grad():
        found = model.eval()(**inputs)  # comes after rank 0 has written
        plain = auto_class.from_pretrained(folder).eval()
        expected = plain(**inputs)
        assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    again = hf_sdp.from_pretrained(folder, sdp, auto_class=auto_class).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, found.logits)
    if task != "masked":
        first = inputs[model.main_input_name]
        chosen = dict(max_new_tokens=4, do_sample=False)
        generated = model.generate(first, synced_gpus=True, **chosen)
        assert torch.equal(generated, plain.generate(first, **chosen))


@pytest.mark.parametrize("name", short("t5", "whisper"))
def test_evaluation_is_that_of_the_saved_model(tmp_path, name):
    run_workers(evaluate_and_reload, name, BLOCK, tmp_path / "saved", world_size=2)


@pytest.mark.parametrize("name", short("gpt2", "mixtral"))
def test_evaluation_of_what_is_held_in_several_parts_is_that_of_the_saved_model(tmp_path, name):
    run_workers(evaluate_and_reload, name, NEURON, tmp_path / "saved", world_size=4)
