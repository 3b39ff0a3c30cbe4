"""Bytes that are sent, and the order of collectives."""

import contextlib
import itertools

import networkx as nx
import pytest
import torch
import torch.distributed as dist

from hf_sdp import SDPAccelerator, SDPConfig, make_plan, patch_model
from hf_sdp.bench.fake_world import fake_world, parallelize
from hf_sdp.engine.sharded import find_sharded
from tests.support.models import batch, batch_for, tiny_config, tiny_model
from tests.support.oracle import freeze
from tests.support.training import EVERYTHING, one_step, prepared
from tests.support.types import BLOCK, MODELS
from tests.support.workers import run_workers


@contextlib.contextmanager
def spied():
    """``[bytes sent], [(collective, ranks of its group)]``, as seen where torch.distributed is called."""
    seen, calls = [0], []

    def smaller(n, tensors):
        return (n - 1) * min(t.nbytes for t in tensors)

    def spy_on(name, original, sent):
        def call(*args, **kwargs):
            group = kwargs.get("group")
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            if tensors[0].numel() > 3:  # neither the gradient norm nor the vote
                seen[0] += sent(dist.get_world_size(group), tensors)
                calls.append((name, tuple(dist.get_process_group_ranks(group))))
            return original(*args, **kwargs)

        return call

    formulas = {
        "all_gather_single": smaller, "all_gather_into_tensor": smaller,
        "reduce_scatter_single": smaller, "reduce_scatter_tensor": smaller,
        "all_reduce": lambda n, t: 2 * (n - 1) * t[0].nbytes // n,
    }  # fmt: skip
    originals = {name: getattr(dist, name) for name in formulas if hasattr(dist, name)}
    try:
        for name, original in originals.items():
            setattr(dist, name, spy_on(name, original, formulas[name]))
        yield seen, calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def count_collectives(config, micro_batches, model_options=None):
    """Bytes sent in the second step: as the engine counts, and as seen where torch.distributed is called."""
    accelerator, model, optimizer = prepared(config, model_options, gradient_accumulation_steps=micro_batches)
    one_step(accelerator, model, optimizer, micro_batches)
    before = find_sharded(model).traffic.bytes_sent
    with spied() as (seen, calls):
        one_step(accelerator, model, optimizer, micro_batches)
    return find_sharded(model).traffic.bytes_sent - before, seen[0], calls


@pytest.mark.parametrize("micro_batches", [pytest.param(1, marks=pytest.mark.long), 3])
@pytest.mark.parametrize("config", [dict(), dict(level="block"), dict(sharding="none"), dict(coverage=0.75)], ids=str)
def test_bytes_sent_are_what_the_formula_says(config, micro_batches):
    """2·C·(r-1)/r of the maskable bytes and 2·(W-1)/W of the shared ones, however long the accumulation window."""
    thirds = dict(hidden_size=48, intermediate_size=96)  # divisible by 3 and 4: nothing is padded
    plan = make_plan(tiny_config(**thirds), SDPConfig(**config), 4)
    r, maskable = plan.replication[0], (plan.full_numel - plan.shared_numel) * 4
    formula = 2 * plan.coverage * (r - 1) / r * maskable + 2 * 3 / 4 * plan.shared_numel * 4
    for counted, seen, _ in run_workers(count_collectives, config, micro_batches, thirds):
        assert counted == seen == pytest.approx(formula, abs=1e-6)


def test_what_layers_hand_on_is_gathered_and_reduced_once():
    """T5's attention returns the position biases that it is given. Their gradient comes last."""
    collectives = []
    with fake_world(4, 1):
        model, _ = parallelize(tiny_model(**MODELS["t5"]), SDPConfig(**BLOCK), torch.device("cpu"))
        find_sharded(model).traffic.watch = lambda kind, module, *_: collectives.append((kind, module))
        model(**batch_for(model, 0, "sequence to sequence")).loss.backward()
    assert len(collectives) > 10 and len(collectives) == len(set(collectives))


def test_gathering_twice_is_the_only_extra_traffic_of_resharding():
    plan = make_plan(tiny_config(), SDPConfig(), 4)
    maskable = (plan.full_numel - plan.shared_numel) * 4
    plain, twice = (run_workers(count_collectives, dict(reshard_after_forward=r), 1)[0][0] for r in (False, True))
    assert maskable * plan.coverage / 2 <= twice - plain <= maskable * plan.coverage / 2 + plan.shared_numel * 3


def order_of_collectives(config, frozen, on_embeddings):
    """Of the second step; the batch is token ids, or what is put in for their embeddings."""
    accelerator = SDPAccelerator()
    model = patch_model(freeze(tiny_model(**EVERYTHING), frozen), SDPConfig(**config))
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-2))
    inputs = batch(dist.get_rank())
    if on_embeddings:
        ids = inputs.pop("input_ids")
        inputs["inputs_embeds"] = torch.nn.functional.one_hot(ids % 32, 32).float()
    for _ in range(2):
        with spied() as (_, calls):
            accelerator.backward(model(**inputs).loss)
            optimizer.step()
            optimizer.zero_grad()
    return calls


ORDERS = [
    dict(coverage=0.75, reshard_after_forward=True),
    dict(level="block", reshard_after_forward=True),
    pytest.param(dict(level="block", coverage=0.75), marks=pytest.mark.long),
    pytest.param(dict(coverage=0.5), marks=pytest.mark.long),
]
LEARNED = {
    "all": ((), False),
    "frozen embeddings": (("model.embed_tokens",), False),
    "frozen lower layers": (("model.embed_tokens", "model.layers.0.", "model.layers.1."), False),
    "inputs_embeds": ((), True),
}


@pytest.mark.parametrize("learned", LEARNED)
@pytest.mark.parametrize("config", ORDERS, ids=str)
def test_order_of_collectives_is_one_global_order(config, learned):
    """Two workers must issue the collectives of all groups they share in the same order, and all these orders must
    fit into one; else NCCL hangs, or pairs the wrong ones."""
    calls = run_workers(order_of_collectives, config, *LEARNED[learned], timeout_s=60)
    for a, b in itertools.combinations(range(4), 2):
        common = [[c for c in calls[w] if {a, b} <= set(c[1])] for w in (a, b)]
        assert common[0] == common[1] and common[0]
    order = nx.DiGraph()
    for worker in calls:  # a collective is its group and how often the group has been used before
        count, events = {}, []
        for _, group in worker:
            count[group] = count.get(group, -1) + 1
            events.append((group, count[group]))
        nx.add_path(order, events)
    assert nx.is_directed_acyclic_graph(order)
    assert any(len(group) not in (1, 4) for _, group in calls[0])
