"""What one worker finds wrong is the same error on all."""

import torch
import torch.distributed as dist

from hf_sdp import SDPConfig, SDPConfigError, patch_model
from tests.support.models import tiny_model
from tests.support.workers import run_workers


def disagree():
    model = tiny_model()
    shapes = {n: p.shape for n, p in model.named_parameters()}
    try:
        patch_model(model, SDPConfig(seed=int(dist.get_rank() == 3)))
    except SDPConfigError as error:
        assert {n: p.shape for n, p in model.named_parameters()} == shapes
        return str(error)


def test_different_plans_are_an_error_on_every_rank_that_names_the_difference():
    errors = run_workers(disagree)
    assert len(set(errors)) == 1 and "seed=0" in errors[0] and "seed=1" in errors[0] and "rank 3" in errors[0]


def fails_on_one_rank():
    """A check that fails on one worker only must not leave the others waiting in a collective."""
    try:
        patch_model(tiny_model() if dist.get_rank() else torch.nn.Linear(2, 2), SDPConfig())
    except SDPConfigError as error:
        return str(error)


def test_a_check_that_fails_on_one_worker_is_an_error_on_all():
    errors = run_workers(fails_on_one_rank)
    assert all(e and "transformers model" in e for e in errors)
    assert "rank 0" in errors[1]
