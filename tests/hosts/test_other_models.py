"""``SDPAccelerator`` beside models that SDP does not train, and what it refuses so that none is trained without SDP."""

import pytest
import torch
from torch import nn

from hf_sdp import SDPAccelerator, SDPConfig, SDPConfigError, patch_model
from hf_sdp.engine.sharded import find_sharded
from hf_sdp.model.state import find_state
from tests.support.models import batch, tiny_model
from tests.support.workers import run_workers

TEACHER = dict(num_hidden_layers=2)


def fresh(sdp_config=None):
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return SDPAccelerator(sdp_config=sdp_config)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def distill(folder):
    """A frozen teacher, one for evaluation, and a module without parameters beside the model that learns."""
    accelerator = fresh(SDPConfig(level="block"))
    teacher, judge, student = tiny_model(**TEACHER).requires_grad_(False), tiny_model(**TEACHER), tiny_model().eval()
    weights = {name: p.clone() for name, p in teacher.named_parameters()}
    judge = accelerator.prepare_model(judge, evaluation_mode=True)
    student, teacher, optimizer, loss = accelerator.prepare(student, teacher, sgd(student), nn.MSELoss())
    assert [find_sharded(m) is not None for m in (student, teacher, judge, loss)] == [True, False, False, False]
    assert [type(m).__name__ for m in (teacher, judge)] == ["LlamaForCausalLM"] * 2  # not in DDP
    inputs = batch(accelerator.process_index)
    student.train()
    accelerator.backward(loss(student(**inputs).logits, teacher.eval()(**inputs).logits))
    assert accelerator.clip_grad_norm_(student.parameters(), 1.0) > 0
    optimizer.step()
    assert all(torch.equal(p, weights[name]) for name, p in teacher.named_parameters())
    accelerator.save_state(folder)
    accelerator.load_state(folder)
    assert accelerator.prepare(student) is student  # once more: nothing happens


def refusals():
    config = SDPConfig()

    def refused(message: str, accelerator, *things):
        models = [thing for thing in things if isinstance(thing, nn.Module)]
        before = [find_state(model) for model in models]
        with pytest.raises(SDPConfigError, match=message):
            accelerator.prepare(*things)
        assert [find_state(model) for model in models] == before

    student, teacher = tiny_model(), tiny_model(**TEACHER)
    both = "one model that learns: there is also LlamaForCausalLM.*requires_grad_.False.*evaluation_mode=True"
    refused(both, fresh(config), student, teacher, sgd(student))
    refused(both, fresh(config), teacher, sgd(student), student)
    refused("there is also Linear", fresh(config), student, nn.Linear(2, 2))
    refused("LlamaForCausalLM is not patched.*requires_grad_", fresh(), patch_model(tiny_model(), config), teacher)
    accelerator = fresh(config)
    accelerator.prepare(teacher)  # the model that learns, as far as anybody can know
    refused(both, accelerator, student, sgd(student))
    refused("SGD is prepared without a model that SDP trains", fresh(config), sgd(student))
    accelerator = fresh(config)
    accelerator.prepare_model(student, evaluation_mode=True)
    refused("SGD is prepared without a model that SDP trains", accelerator, sgd(student))
    accelerator = fresh(config)
    refused("parameter of shape", accelerator, accelerator.prepare(tiny_model()), sgd(student))


def test_models_that_are_not_trained_are_accelerates(tmp_path):
    run_workers(distill, tmp_path / "state")


def test_nothing_is_trained_without_sdp():
    run_workers(refusals)
