"""Re-pointing, element-wise optimizers only, global clipping, and the fp16 scaler."""

import pytest
import torch
import torch.distributed as dist

from hf_sdp import SDPAccelerator, SDPConfig, SDPConfigError, SDPStateError, consolidate, patch_model
from hf_sdp.engine.optimizer import ELEMENTWISE_OPTIMIZERS, refuse_unless_elementwise
from hf_sdp.engine.sharded import find_sharded
from hf_sdp.model.state import local_tensor
from tests.support.models import batch, tiny_model
from tests.support.training import prepared
from tests.support.workers import run_workers

VARIANTS = {
    "AdamW for-loop": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9, nesterov=True, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1, foreach=True),
    "Adagrad for-loop": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1, foreach=False),
}


REFERENCES = {"AdamW": "AdamW for-loop", "SGD": "SGD momentum", "Adagrad": "Adagrad for-loop"}


def train_with(names: list[str]):
    result = {}
    for name in names:
        torch.manual_seed(0)
        accelerator = SDPAccelerator()
        model = patch_model(tiny_model(), SDPConfig(coverage=0.75))
        decay = [p for p in model.parameters() if p.dim() > 1]
        other = [p for p in model.parameters() if p.dim() == 1]
        optimizer = VARIANTS[name]([{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}])
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda s: 1 / (s + 1), lambda s: 1.0])
        # The optimizer before the model: order of the arguments must not matter.
        optimizer, model, scheduler = accelerator.prepare(optimizer, model, scheduler)
        groups = [g["params"] for g in optimizer.param_groups]
        assert [len(g) for g in groups] == [
            len(decay),
            len(other),
        ]  # groups stay as the user and the scheduler know them
        ours = list(find_sharded(model).parameters.values())
        assert sorted(map(id, sum(groups, []))) == sorted(map(id, ours))  # each once, by identity
        for step in range(3):
            accelerator.backward(model(**batch(step * 4 + dist.get_rank())).loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            assert all(p.grad is None for p in ours)
        assert [g["lr"] for g in optimizer.param_groups][0] < [g["lr"] for g in optimizer.param_groups][1] * 0.5
        assert all(
            not hasattr(t, "device_mesh") for s in optimizer.state.values() for t in s.values()
        )  # plain local shards
        result[name] = consolidate(model)
    return result


def test_every_kernel_trains_the_full_parameters():
    results = run_workers(train_with, list(VARIANTS))[0]
    start = tiny_model().state_dict()
    for name, weights in results.items():
        reference = results[REFERENCES.get(name.split()[0], name)]
        for parameter, tensor in weights.items():
            torch.testing.assert_close(tensor, reference[parameter], rtol=0, atol=1e-6)
            assert not torch.equal(tensor, start[parameter])


def refuse():
    from transformers.optimization import Adafactor

    messages = []
    model = patch_model(tiny_model(), SDPConfig())
    matrices = [p for p in model.parameters() if p.dim() == 2]
    candidates = [Adafactor(matrices), torch.optim.LBFGS(matrices), torch.optim.SparseAdam(matrices)]
    candidates += [torch.optim.Muon(matrices)] if hasattr(torch.optim, "Muon") else []
    for optimizer in candidates:
        with pytest.raises(SDPConfigError, match="not known to update every element") as error:
            SDPAccelerator().prepare(model, optimizer)
        messages.append(str(error.value).split()[0])
        assert find_sharded(model) is None  # before anything is changed
    accelerator = SDPAccelerator()
    foreign = torch.optim.SGD(tiny_model().parameters(), lr=1)
    stale = torch.optim.SGD(model.parameters(), lr=1, momentum=0.9)
    model(**batch(0)).loss.backward()
    stale.step()
    model.zero_grad()
    model = accelerator.prepare(model)
    with pytest.raises(SDPConfigError, match="not one of the model's"):
        accelerator.prepare(foreign)
    with pytest.raises(SDPStateError, match="already has state"):
        accelerator.prepare(stale)
    return messages


def test_what_is_not_element_wise_is_refused_by_name():
    messages = run_workers(refuse)
    assert messages[0][:3] == ["Adafactor", "LBFGS", "SparseAdam"] and all(m == messages[0] for m in messages)


def named_like_a_known_one():
    """Classes that are not torch's, whatever they are called or derived from."""
    known = torch.optim.AdamW
    lars = type("LARS", (torch.optim.SGD,), {})
    foreign = type("AdamW", (torch.optim.Optimizer,), {"__init__": known.__init__, "__module__": "galore_torch.adamw"})
    derived = type("AdamW", (known,), {"__module__": "bitsandbytes.optim.adamw"})
    model = patch_model(tiny_model(), SDPConfig())
    for make in (lars, derived):
        with pytest.raises(SDPConfigError, match="not known to update every element"):
            SDPAccelerator().prepare(model, make(model.parameters(), lr=0.1))
    with pytest.raises(SDPConfigError, match="add 'galore_torch.adamw.AdamW' to"):
        refuse_unless_elementwise(object.__new__(foreign))
    ELEMENTWISE_OPTIMIZERS.add(f"{lars.__module__}.LARS")
    try:
        SDPAccelerator().prepare(model, lars(model.parameters(), lr=0.1))
    finally:
        ELEMENTWISE_OPTIMIZERS.remove(f"{lars.__module__}.LARS")


def test_optimizers_are_known_by_their_class_not_by_its_name():
    run_workers(named_like_a_known_one)


def test_the_optimizers_of_torch_are_those_that_it_has():
    for name in ELEMENTWISE_OPTIMIZERS:
        module, _, cls = name.rpartition(".")
        if module.startswith("torch."):
            made = getattr(torch.optim, cls)
            assert f"{made.__module__}.{made.__qualname__}" == name


def trained_by_adagrad(coverage: float):
    accelerator = SDPAccelerator()
    model = patch_model(tiny_model(), SDPConfig(coverage=coverage))
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-2, initial_accumulator_value=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    for step in range(3):
        accelerator.backward(model(**batch(step * 4 + dist.get_rank())).loss)
        optimizer.step()
        optimizer.zero_grad()
    return consolidate(model)


def test_adagrad_at_full_coverage_is_that_of_one_process():
    expected = tiny_model()
    optimizer = torch.optim.Adagrad(expected.parameters(), lr=1e-2, initial_accumulator_value=0.1)
    for step in range(3):
        for rank in range(4):
            (expected(**batch(step * 4 + rank), use_cache=False).loss / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in run_workers(trained_by_adagrad, 1.0)[0].items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=0, atol=1e-5)


def patch_in_prepare(early: bool):
    """An optimizer made from the full model, which prepare patches; or made after prepare."""
    accelerator = SDPAccelerator(sdp_config=SDPConfig(coverage=0.75, level="block"))
    model = tiny_model(seed=dist.get_rank())
    if early:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
    else:
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=1e-2))
    for step in range(3):
        accelerator.backward(model(**batch(step * 4 + dist.get_rank())).loss)
        norm = accelerator.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return consolidate(model), norm.item()


def test_prepare_patches_and_optimizers_may_come_before_or_after():
    (early, early_norm), (late, late_norm) = (run_workers(patch_in_prepare, e)[0] for e in (True, False))
    assert early_norm == late_norm
    assert all(torch.equal(early[n], late[n]) for n in early)
    start = tiny_model().state_dict()
    assert not any(torch.equal(early[n], start[n]) for n in early)


def norms():
    accelerator, model, _ = prepared(dict(coverage=0.75))
    accelerator.backward(model(**batch(dist.get_rank())).loss)
    measured = {
        p: accelerator.clip_grad_norm_(model.parameters(), float("inf"), p).item() for p in (1.0, 2.0, float("inf"))
    }
    local = torch.stack([local_tensor(p.grad).norm() for p in model.parameters()]).norm().item()
    accelerator.clip_grad_norm_(model.parameters(), 0.01)
    clipped = accelerator.clip_grad_norm_(model.parameters(), float("inf")).item()
    return measured, local, clipped


def test_norms_are_global_and_equal():
    results = run_workers(norms)
    assert all(measured == results[0][0] for measured, _, _ in results)
    assert len({local for _, local, _ in results}) == 4  # a local norm would have clipped each worker differently
    assert sum(local**2 for _, local, _ in results) ** 0.5 == pytest.approx(results[0][0][2.0], rel=1e-5)
    assert all(clipped == pytest.approx(0.01, rel=1e-3) for _, _, clipped in results)


def overflow(fused: bool):
    """Accelerate has no fp16 scaler on CPU, so it is put into its slot by hand."""
    from hf_sdp.engine.gradients import GlobalGradScaler

    accelerator = SDPAccelerator()
    accelerator.scaler = GlobalGradScaler("cpu", init_scale=8.0, growth_interval=1000)
    model = patch_model(tiny_model(), SDPConfig())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused))
    skipped, scales = [], []
    before = consolidate(model)
    for step in range(3):
        accelerator.backward(model(**batch(step * 4 + dist.get_rank())).loss)
        if step == 0 and dist.get_rank() == 1:  # one element of one worker's shard
            local_tensor(next(iter(find_sharded(model).parameters.values())).grad)[0, 0] = float("inf")
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        skipped.append(optimizer.step_was_skipped)
        scales.append(accelerator.scaler.get_scale())
        optimizer.zero_grad()
        if step == 0:
            after = consolidate(model)
            assert after is None or all(torch.equal(after[n], before[n]) for n in before)
    return skipped, scales, consolidate(model)


@pytest.mark.parametrize("fused", [False, True])
def test_an_overflow_on_one_worker_skips_the_step_on_all(fused):
    results = run_workers(overflow, fused)
    # A fused kernel skips by itself; Accelerate reports such a step as taken, with or without SDP.
    skipped = [not fused, False, False]
    assert all((s, c) == (skipped, [4.0, 4.0, 4.0]) for s, c, _ in results)
    start = tiny_model().state_dict()
    assert all(t.isfinite().all() and not torch.equal(t, start[n]) for n, t in results[0][2].items())
