"""What callbacks and loops write into parameters is what is evaluated and saved."""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, TrainerCallback

import hf_sdp
from hf_sdp import SDPAccelerator, SDPConfig, SDPStateError, patch_model
from hf_sdp.engine.sharded import find_sharded
from hf_sdp.model.state import local_tensor
from tests.support.models import batch, tiny_model
from tests.support.trainer import Rows, make_trainer
from tests.support.workers import run_workers


def shrink(model) -> None:
    """As averaged weights are swapped in: through ``.data``, which torch does not count."""
    for parameter in find_sharded(model).parameters.values():
        local_tensor(parameter.detach()).data.mul_(0.5)


class Swapped(TrainerCallback):
    """After SDPCallback in every event."""

    def __init__(self, when: str):
        setattr(self, when, lambda args, state, control, model=None, **kwargs: shrink(model))


def swap(folder, when: str, config: dict):
    trainer = make_trainer(folder, config, dict(max_steps=2))
    trainer.add_callback(Swapped(when))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model(f"{folder}/saved")
    return before, after


@pytest.mark.parametrize("when", ["on_train_end", "on_step_end"])
@pytest.mark.parametrize("config", [dict(), dict(level="block", sharding="none")], ids=str)
def test_weights_that_a_callback_swaps_in_are_evaluated_and_saved(tmp_path, when, config):
    losses = run_workers(swap, tmp_path, when, config)
    assert all(pair == losses[0] for pair in losses)
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    largest = max(t.abs().max() for t in tiny_model().state_dict().values())
    assert max(t.abs().max() for t in saved.values()) < 0.6 * largest  # what was written is there
    reloaded, rows = LlamaForCausalLM.from_pretrained(tmp_path / "saved"), Rows(24, seed=1)
    expected = reloaded(input_ids=rows.ids, labels=rows.labels).loss.item()
    assert losses[0][1] == pytest.approx(expected, abs=1e-5) and losses[0][0] != pytest.approx(expected, abs=1e-3)


def write_between(config: dict):
    model = SDPAccelerator().prepare(patch_model(tiny_model(), SDPConfig(**config)))
    rows = batch(dist.get_rank())
    model.eval()
    first = model(**rows).loss.item()
    shrink(model)
    hf_sdp.weights_changed(model)
    second = model(**rows).loss.item()
    shrink(model)
    model.eval()
    third = model(**rows).loss.item()
    return first, second, third


@pytest.mark.parametrize("config", [dict(), dict(level="block", coverage=0.75)], ids=str)
def test_a_loop_says_that_weights_have_changed(config):
    for rank, losses in enumerate(run_workers(write_between, config)):
        model = tiny_model().eval()
        for loss in losses:
            assert loss == pytest.approx(model(**batch(rank)).loss.item(), abs=1e-5)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(0.5)


def evaluate_differently():
    model = SDPAccelerator().prepare(patch_model(tiny_model(), SDPConfig(evaluation_timeout_s=5))).eval()
    model(**batch(0))
    if dist.get_rank() == 0:
        hf_sdp.weights_changed(model)
    with pytest.raises(SDPStateError, match="a forward in eval mode is a collective"):
        model(**batch(0))


def test_only_some_workers_ask_for_new_weights():
    """The others would take part in another collective."""
    run_workers(evaluate_differently)
