"""What one worker finds wrong is the same error on all, and so is what differs between workers."""

import pytest
import torch
import torch.distributed as dist

import hf_sdp.preflight
from hf_sdp import SDPAccelerator, SDPConfig, SDPConfigError, SDPStateError, from_config, patch_model
from tests.support.models import tiny_config, tiny_model
from tests.support.workers import run_workers

ODD = 3  # the rank that has something else


def error_of(model, config=None, message=None):
    shapes = {n: p.shape for n, p in model.named_parameters()}
    with pytest.raises(SDPConfigError) as raised:
        patch_model(model, config or SDPConfig())
    assert {n: p.shape for n, p in model.named_parameters()} == shapes
    return str(raised.value)


def disagree():
    is_odd = dist.get_rank() == ODD
    said = {"seed=0 on rank 0, seed=1 on rank 3": error_of(tiny_model(), SDPConfig(seed=int(is_odd)))}
    model = tiny_model()
    if is_odd:
        model.lm_head.to(torch.bfloat16)
    said["lm_head.weight: dtype=torch.float32 on rank 0, dtype=torch.bfloat16 on rank 3"] = error_of(model)
    model = tiny_model()
    model.model.norm.weight.requires_grad_(not is_odd)
    said["parameter model.norm.weight: requires_grad=True on rank 0, requires_grad=False on rank 3"] = error_of(model)
    model = tiny_model()
    if is_odd:
        model.model.register_buffer("seen", torch.zeros(3))
    said["buffer model.seen: shape=(none) on rank 0, shape=(3,) on rank 3"] = error_of(model)
    said["rms_norm_eps=1e-06 on rank 0, rms_norm_eps=1e-05 on rank 3"] = error_of(
        tiny_model(rms_norm_eps=1e-5 if is_odd else 1e-6)
    )
    rope = {"rope_type": "default", "rope_theta": 5e5 if is_odd else 1e4}
    said["rope_parameters.rope_theta=10000.0 on rank 0, rope_parameters.rope_theta=500000.0 on rank 3"] = error_of(
        tiny_model(rope_parameters=rope)
    )
    with pytest.raises(SDPConfigError) as raised:
        from_config(tiny_config(), SDPConfig(), seed=int(is_odd))
    said["from_config: seed=0 on rank 0, seed=1 on rank 3"] = str(raised.value)
    return said


def test_a_difference_is_an_error_on_every_rank_that_names_it():
    results = run_workers(disagree)
    assert all(result == results[0] for result in results)
    for expected, said in results[0].items():
        assert expected in said


def only_values_differ():
    """What is sent from rank 0, and what says nothing about the model."""
    model = tiny_model(seed=dist.get_rank())
    model.model.register_buffer("seen", torch.full((3,), float(dist.get_rank())))
    model.config._name_or_path = f"copy-{dist.get_rank()}"
    return patch_model(model, SDPConfig()).model.seen.tolist()


def test_buffers_are_those_of_rank_0():
    assert run_workers(only_values_differ) == [[0.0] * 3] * 4


def fails_on_one_rank():
    """A check that fails on one worker only must not leave the others waiting in a collective."""
    said = []
    try:
        patch_model(tiny_model() if dist.get_rank() else torch.nn.Linear(2, 2), SDPConfig())
    except SDPConfigError as error:
        said.append(str(error))
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == ODD:
            patch.setattr(hf_sdp.preflight, "make_plans", lambda *args: {}["a key that is missing"])
        with pytest.raises((KeyError, SDPStateError)) as raised:
            patch_model(tiny_model(), SDPConfig())
    said.append(str(raised.value))
    model = patch_model(tiny_model(), SDPConfig())
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == ODD:
            patch.setattr(model, "to", lambda device: 1 / 0)
        with pytest.raises((ZeroDivisionError, SDPStateError)) as raised:
            SDPAccelerator().prepare(model)
    said.append(str(raised.value))
    return said


def test_what_fails_on_one_worker_is_an_error_on_all():
    results = run_workers(fails_on_one_rank)
    for rank, (check, plan, move) in enumerate(results):
        assert "transformers model" in check and ("rank 0" in check or rank == 0)
        assert "a key that is missing" in plan and ("rank 3: KeyError" in plan or rank == ODD)
        assert "division by zero" in move and ("rank 3: ZeroDivisionError" in move or rank == ODD)


def optimizers_disagree():
    is_odd, said = dist.get_rank() == ODD, []

    def refuse(make):
        model = patch_model(tiny_model(), SDPConfig(level="block"))
        with pytest.raises(SDPConfigError) as raised:
            SDPAccelerator().prepare(model, *make(model))
        said.append(str(raised.value))

    def groups(model, moved: str):
        first = [p for n, p in model.named_parameters() if n != moved]
        rest = [p for n, p in model.named_parameters() if n == moved]
        return [torch.optim.AdamW([{"params": first}, {"params": rest, "weight_decay": 0.0}], lr=1e-3)]

    refuse(lambda model: [torch.optim.AdamW(model.parameters(), lr=1e-2 if is_odd else 1e-3)])
    refuse(lambda model: [(torch.optim.SGD if is_odd else torch.optim.AdamW)(model.parameters(), lr=1e-3)])
    refuse(lambda model: [torch.optim.AdamW(model.parameters(), lr=1e-3)][int(is_odd) :])
    refuse(lambda model: groups(model, "lm_head.weight" if is_odd else "model.norm.weight"))
    return said


def test_optimizers_that_differ_are_an_error_on_every_rank():
    results = run_workers(optimizers_disagree)
    assert all(result == results[0] for result in results)
    lr, kind, number, groups = results[0]
    assert "group 0 of optimizer 0: lr=0.001 on rank 0, lr=0.01 on rank 3" in lr
    assert "class=AdamW on rank 0, class=SGD on rank 3" in kind
    assert "number=1 on rank 0, number=0 on rank 3" in number
    assert "model.norm.weight is in group 0 on some, in group 1 on others" in groups
