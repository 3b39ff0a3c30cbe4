"""What users do around a boundary: an error that says so, not weights that silently no longer learn."""

import pytest
import torch
import torch.distributed as dist

from hf_sdp import SDPAccelerator, SDPConfig, SDPStateError, follow_schedule, patch_model
from tests.support.models import batch, tiny_model
from tests.support.workers import run_workers


def prepared(**options):
    accelerator = SDPAccelerator(**options)
    model = patch_model(tiny_model(), SDPConfig(coverage_schedule=[(0.0, 0.5), (0.5, 1.0)]))
    return accelerator, *accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


def backward(accelerator, model) -> None:
    accelerator.backward(model(**batch(dist.get_rank())).loss)


def step(accelerator, model, optimizer) -> None:
    backward(accelerator, model)
    optimizer.step()
    optimizer.zero_grad()


def in_the_middle_of_a_window():
    accelerator, model, optimizer = prepared(gradient_accumulation_steps=2)
    for _ in range(2):  # of which the first only accumulates
        with accelerator.accumulate(model):
            backward(accelerator, model)
            with pytest.raises(SDPStateError, match="has a gradient, which would be lost"):
                accelerator.follow_schedule(1, 2)
            optimizer.step()
            optimizer.zero_grad()
    assert accelerator.follow_schedule(1, 2)


def with_zero_gradients():
    accelerator, model, optimizer = prepared()
    backward(accelerator, model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert accelerator.follow_schedule(1, 2)
    step(accelerator, model, optimizer)


def without_the_optimizer():
    accelerator, model, optimizer = prepared()
    step(accelerator, model, optimizer)
    parameters = list(model.parameters())
    follow_schedule(model, 1, 2)
    backward(accelerator, model)
    with pytest.raises(SDPStateError, match="give follow_schedule all optimizers"):
        optimizer.step()
    for clip in (accelerator.clip_grad_norm_, accelerator.clip_grad_value_):
        with pytest.raises(SDPStateError, match="Take model.parameters"):
            clip(parameters, 0.5)
        clip(model.parameters(), 0.5)
    copies = [torch.zeros_like(p) for p in model.parameters()]
    with pytest.raises(RuntimeError):  # as a callback does that averages weights; not the end of the process
        for copy, p in zip(copies, parameters, strict=False):
            copy.lerp_(p, 0.5)


def with_a_hook():
    accelerator, model, optimizer = prepared()
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        hook = getattr(model.lm_head.weight, register)(lambda *args: None)
        with pytest.raises(SDPStateError, match="lm_head.weight has a hook"):
            accelerator.follow_schedule(1, 2)
        hook.remove()
    assert accelerator.follow_schedule(1, 2)


def on_one_worker():
    accelerator, model, optimizer = prepared()
    with pytest.raises(
        SDPStateError, match="phase 1 of the coverage schedule is a collective|a forward in eval mode is"
    ):
        if dist.get_rank() == 0:
            accelerator.follow_schedule(1, 2)
        else:
            model.eval()(**batch(0))
    model.train()
    step(accelerator, model, optimizer)


@pytest.mark.parametrize(
    "misuse", [in_the_middle_of_a_window, with_zero_gradients, without_the_optimizer, with_a_hook, on_one_worker]
)
def test_misuse_is_an_error(misuse):
    run_workers(misuse, world_size=2)
