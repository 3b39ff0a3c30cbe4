"""``HF_SDP_DEBUG``: workers that gather other things than each other are told so."""

import os

import pytest
import torch
import torch.distributed as dist

from hf_sdp import SDPStateError
from hf_sdp.engine.debug import VARIABLE
from hf_sdp.engine.sharded import find_sharded
from tests.support.training import EVERYTHING, one_step, prepared
from tests.support.workers import run_workers


def swap_two_layers_on_one_worker(config, model_options, is_watched: bool):
    """Layers are of one size: what is gathered of them is paired, whatever it is."""
    if is_watched and dist.get_rank() == 2:  # set on one worker: all compare
        os.environ[VARIABLE] = "1"
    try:
        accelerator, model, optimizer = prepared(config, model_options, torch.optim.SGD)
    finally:
        os.environ.pop(VARIABLE, None)
    assert (find_sharded(model).traffic.watch is not None) == is_watched
    one_step(accelerator, model, optimizer, 2)
    one_step(accelerator, model, optimizer)
    if dist.get_rank() == 1:
        layers = model.model.layers._modules
        layers["0"], layers["1"] = layers["1"], layers["0"]
    if not is_watched:
        one_step(accelerator, model, optimizer)
        return None
    with pytest.raises(SDPStateError) as raised:
        one_step(accelerator, model, optimizer)
    return str(raised.value)


@pytest.mark.parametrize("config", [dict(coverage=1.0), dict(coverage=1.0, sharding="none")], ids=str)
def test_the_first_difference_is_named_on_all_workers(config):
    messages = run_workers(swap_two_layers_on_one_worker, config, None, True)
    assert len(set(messages)) == 1
    kind = "all-reduce" if config.get("sharding") else "all-gather"
    for text in ("workers [0, 1, 2, 3]", f"rank 0: {kind}", f"rank 1: {kind}", "layers.0.", "layers.1.", "float32"):
        assert text in messages[0]


def test_without_the_variable_nothing_is_compared():
    assert run_workers(swap_two_layers_on_one_worker, dict(coverage=1.0), None, False) == [None] * 4


def train_watched(config):
    os.environ[VARIABLE] = "1"
    try:
        accelerator, model, optimizer = prepared(config, EVERYTHING, gradient_accumulation_steps=2)
    finally:
        del os.environ[VARIABLE]
    sharded, seen = find_sharded(model), []
    watch = sharded.traffic.watch
    sharded.on_change.insert(0, lambda: seen.append({ranks: list(calls) for ranks, calls in watch.seen.items()}))
    for _ in range(2):
        one_step(accelerator, model, optimizer, 2)
    return [{ranks: calls for ranks, calls in mine.items() if len(ranks) > 1} for mine in seen]


@pytest.mark.parametrize(
    "config",
    [dict(level="block"), dict(coverage=0.75), dict(coverage=0.75, reshard_after_forward=True), dict(sharding="none")],
    ids=str,
)
def test_what_is_right_is_the_same_on_all_members_of_a_group(config):
    """Workers have other local names for what they share, and hold other things."""
    results = run_workers(train_watched, config)
    for step in range(2):
        groups = set().union(*(result[step] for result in results))
        assert any(len(ranks) < 4 for ranks in groups)
        for ranks in groups:
            assert all(results[rank][step][ranks] == results[ranks[0]][step][ranks] for rank in ranks)
