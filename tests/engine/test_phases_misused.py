"""What users do around a boundary: an error that says so, not weights that silently no longer learn."""

import pytest
import torch
import torch.distributed as dist

from hf_sdp import (
    SDPAccelerator,
    SDPConfig,
    SDPStateError,
    consolidate,
    follow_schedule,
    global_norm,
    patch_model,
    phases,
)
from hf_sdp.engine.gradients import GlobalGradScaler
from tests.support.models import batch, tiny_model
from tests.support.workers import run_workers

GROWS = [(0.0, 0.5), (0.5, 1.0)]


def prepared(**options):
    accelerator = SDPAccelerator(**options)
    model = patch_model(tiny_model(), SDPConfig(coverage_schedule=GROWS))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert not accelerator.follow_schedule(0, 2)
    return accelerator, model, optimizer


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


def with_gradients_that_are_zeroed_too_late():
    """Many loops begin a step so. It is an error at the second step, not after hours, when the phase begins."""
    accelerator, model, optimizer = prepared()
    for number in range(2):
        if number == 1:
            for _ in range(2):
                with pytest.raises(SDPStateError, match="has a gradient, which would be lost"):
                    accelerator.follow_schedule(number, 100)
            optimizer.zero_grad()
        assert not accelerator.follow_schedule(number, 100)
        optimizer.zero_grad()
        for _ in range(2):  # micro-batches: of the second one there are gradients
            assert not accelerator.follow_schedule(number, 100)
            backward(accelerator, model)
        optimizer.step()


def with_zero_gradients():
    accelerator, model, optimizer = prepared()
    backward(accelerator, model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert accelerator.follow_schedule(1, 2)
    step(accelerator, model, optimizer)


def without_the_optimizer():
    """It has taken a step, and its moments would be lost: an error at the next one, and nothing is changed."""
    accelerator, model, optimizer = prepared()
    step(accelerator, model, optimizer)
    for num_steps in (100, 2):  # within the phase, and at the boundary
        for _ in range(2):
            with pytest.raises(
                SDPStateError, match="SGD trains LlamaForCausalLM, and follow_schedule was not given it"
            ):
                follow_schedule(model, 1, num_steps)
    follow_schedule(model, 1, 2, [optimizer])
    step(accelerator, model, optimizer)


def with_parameters_of_before():
    accelerator, model, optimizer = prepared()
    parameters = list(model.parameters())
    follow_schedule(model, 1, 2)
    backward(accelerator, model)
    with pytest.raises(SDPStateError, match="give follow_schedule all optimizers"):
        optimizer.step()
    for clip in (accelerator.clip_grad_norm_, accelerator.clip_grad_value_):
        with pytest.raises(SDPStateError, match="Take model.parameters"):
            clip(parameters, 0.5)
        clip(model.parameters(), 0.5)
    assert global_norm(list(model.parameters())) > 0
    with pytest.raises(SDPStateError, match="Take model.parameters"):
        global_norm(parameters)  # of tensors that are freed it would be zero
    copies = [torch.zeros_like(p) for p in model.parameters()]
    with pytest.raises(RuntimeError):  # as a callback does that averages weights; not the end of the process
        for copy, p in zip(copies, parameters, strict=False):
            copy.lerp_(p, 0.5)


def after_a_forward_alone():
    """Its parameters stay gathered."""
    accelerator, model, optimizer = prepared()
    backward(accelerator, model)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model(**batch(0))
    weights = consolidate(model)
    with torch.no_grad():
        model(**batch(0))
    assert accelerator.follow_schedule(1, 2)
    after = consolidate(model)
    assert weights is None or all(torch.equal(after[name], weights[name]) for name in weights)
    step(accelerator, model, optimizer)


def frozen_since_it_was_patched():
    accelerator = SDPAccelerator()
    model = patch_model(tiny_model(), SDPConfig(coverage_schedule=GROWS))
    model.model.layers[1].mlp.requires_grad_(False)
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    accelerator.follow_schedule(0, 2)
    step(accelerator, model, optimizer)
    assert accelerator.follow_schedule(1, 2)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert len(frozen) == 3 and all(name.startswith("model.layers.1.mlp.") for name in frozen)
    step(accelerator, model, optimizer)


def with_a_forward_of_its_own():
    """Other libraries set it on an instance."""
    accelerator, full, calls = SDPAccelerator(), tiny_model(), []
    mlp = full.model.layers[1].mlp
    original = mlp.forward

    def counted(*args):
        calls.append(args)
        return original(*args)

    mlp.forward = counted
    patch_model(full, SDPConfig(coverage_schedule=GROWS))
    model, optimizer = accelerator.prepare(full, torch.optim.SGD(full.parameters(), lr=0.1))
    accelerator.follow_schedule(0, 2)
    step(accelerator, model, optimizer)
    assert len(calls) == 1
    assert accelerator.follow_schedule(1, 2)
    step(accelerator, model, optimizer)
    assert len(calls) == 2


def without_an_accelerator():
    """Where nothing is accumulated, loops call ``backward`` themselves."""
    accelerator = SDPAccelerator()
    model = patch_model(tiny_model(), SDPConfig(coverage_schedule=GROWS))
    model = accelerator.prepare(model)
    with pytest.raises(SDPStateError, match="has a coverage_schedule that nobody follows"):
        model(**batch(dist.get_rank())).loss.backward()


def with_a_hook():
    """It is said at the second step, and an error when the phase begins."""
    accelerator, model, optimizer = prepared()
    warned: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases.logger, "warning", lambda message, *values: warned.append(message % values))
        hook = model.lm_head.weight.register_hook(lambda grad: None)
        assert not accelerator.follow_schedule(1, 100) and not accelerator.follow_schedule(2, 100)
        hook.remove()
    assert [message[:26] for message in warned] == ["lm_head.weight has a hook "] * (dist.get_rank() == 0)
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


def of_two_models():
    """Each with an optimizer of its own, one of them compared with one that trains alone."""
    losses = []
    for alone in (True, False):
        accelerator = SDPAccelerator()
        models = [patch_model(tiny_model(seed), SDPConfig(coverage_schedule=GROWS)) for seed in range(2 - alone)]
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in models]
        prepared = accelerator.prepare(*models, *optimizers)
        models, optimizers = prepared[: len(models)], prepared[len(models) :]
        for number in range(4):
            assert accelerator.follow_schedule(number, 4) == (number == 2)
            for model, optimizer in zip(models, optimizers, strict=True):
                loss = model(**batch(number * dist.get_world_size() + dist.get_rank())).loss
                losses += [loss.item()] if model is models[0] else []
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    assert losses[:4] == losses[4:] and len({*losses}) == 4


def with_a_loss_scaler():
    """Of powers of two: it changes nothing. The last step before the boundary and the first one after it overflow on
    one worker, and are taken again."""
    weights = []
    for scales in (False, True):
        accelerator = SDPAccelerator()
        if scales:
            accelerator.scaler = GlobalGradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        model = patch_model(tiny_model(), SDPConfig(coverage_schedule=GROWS))
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        for number in range(4):
            assert accelerator.follow_schedule(number, 4) == (number == 2)
            for overflows in (True, False) if scales and number in (1, 2) else (False,):
                backward(accelerator, model)
                if overflows and dist.get_rank() == 1:
                    next(p for p in model.parameters()).grad.to_local()[0, 0] = torch.inf
                optimizer.step()
                optimizer.zero_grad()
        weights.append(consolidate(model))
    assert accelerator.scaler.get_scale() == 2.0**8
    plain, scaled = weights
    assert plain is None or all(torch.allclose(scaled[name], plain[name], atol=1e-6) for name in plain)


@pytest.mark.parametrize(
    "misuse",
    [
        in_the_middle_of_a_window,
        with_gradients_that_are_zeroed_too_late,
        with_zero_gradients,
        without_the_optimizer,
        with_parameters_of_before,
        without_an_accelerator,
        with_a_hook,
        on_one_worker,
    ],
)
def test_misuse_is_an_error(misuse):
    run_workers(misuse, world_size=2)


@pytest.mark.parametrize(
    "unusual",
    [
        after_a_forward_alone,
        frozen_since_it_was_patched,
        with_a_forward_of_its_own,
        of_two_models,
        with_a_loss_scaler,
    ],
)
def test_unusual_ways_to_a_boundary(unusual):
    run_workers(unusual, world_size=2)
