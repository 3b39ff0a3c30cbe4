"""Meshes, sharding, traffic, order and consistency, with four real workers."""

import itertools

import networkx as nx
import pytest
import torch
import torch.distributed as dist
from models import batch, tiny_config, tiny_model
from test_oracle import compare
from workers import run_workers

from hf_sdp import SDPAccelerator, SDPConfig, SDPConfigError, SDPStateError, consolidate, make_plan, patch_model, verify
from hf_sdp.checkpoint.load import load_weights
from hf_sdp.engine.metrics import state_bytes
from hf_sdp.engine.placement import numel, owned_boxes
from hf_sdp.model.state import get_state, local_tensor

EVERYTHING = dict(
    num_attention_heads=8, num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
)


@pytest.mark.parametrize("masking", ["forward", "backward"])
@pytest.mark.parametrize(
    "config",
    [
        dict(coverage=0.75, reshard_after_forward=True),
        dict(coverage=0.25),
        dict(level="block", coverage=0.75, reshard_after_forward=True),
        dict(level="block", block_granularity="layer", seed=1),
        dict(coverage=0.75, sharding="none"),
    ],
    ids=str,
)
def test_model_variants_equal_the_oracle(config, masking):
    """Grouped queries, biases, tied embeddings; modules in several parts; gathering twice."""
    compare(dict(masking=masking, **config), EVERYTHING, optimizer="adamw", accumulation=2, steps=4)


@pytest.mark.parametrize(
    "config", [dict(), dict(level="block"), dict(sharding="none"), dict(masking="backward")], ids=str
)
def test_replicas_of_subnetworks_equal_the_oracle(config):
    """Two subnetworks on four workers: workers 0 and 2 hold the same one."""
    options = dict(coverage=1.0) if config.get("level") != "block" else dict(coverage=0.5)
    compare({**options, **config, "num_subnetworks": 2}, steps=4, oracle=dict(simulate=2), accumulation=2)


def test_an_odd_world_with_uneven_shards_equals_the_oracle():
    """Three workers, two thirds each, sizes that no shard divides: FSDP2 pads, nothing is lost."""
    odd = dict(hidden_size=20, intermediate_size=33, num_attention_heads=5, num_key_value_heads=5)
    compare(dict(coverage=2 / 3), odd, world_size=3, steps=4)
    compare(dict(coverage=2 / 3, level="block"), odd, world_size=3, steps=4)


def prepared(config: dict, model_options: dict | None = None, optimizer=torch.optim.AdamW, **accelerator_options):
    accelerator = SDPAccelerator(**accelerator_options)
    model = patch_model(tiny_model(**(model_options or {})), SDPConfig(**config))
    model, optimizer = accelerator.prepare(model, optimizer(model.parameters(), lr=1e-2))
    return accelerator, model, optimizer


def one_step(accelerator, model, optimizer, micro_batches: int = 1):
    for micro in range(micro_batches):
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch(micro * dist.get_world_size() + dist.get_rank())).loss)
            optimizer.step()
            optimizer.zero_grad()


def measure_state(config, model_options):
    accelerator, model, optimizer = prepared(config, model_options)
    accelerator.backward(model(**batch(dist.get_rank())).loss)
    gradients = state_bytes(model, None)["gradients"]
    optimizer.step()
    measured = {**state_bytes(model, optimizer), "gradients": gradients}
    padded = sum(local_tensor(p.detach()).untyped_storage().nbytes() for p in get_state(model).parameters.values())
    return measured, padded


@pytest.mark.parametrize("level", ["neuron", "block"])
@pytest.mark.parametrize("masking", ["forward", "backward"])
def test_full_sharding_stores_one_world_th_to_the_byte(level, masking):
    full = make_plan(tiny_config(), SDPConfig(level=level), 4).full_numel * 4
    for measured, padded in run_workers(measure_state, dict(level=level, masking=masking), {}):
        assert measured == {"parameters": full // 4, "gradients": full // 4, "optimizer": 2 * full // 4}
        assert padded == full // 4


def test_uneven_shards_store_everything_once_and_pad_at_most_a_row_each():
    odd = dict(hidden_size=20, intermediate_size=33, num_attention_heads=5, num_key_value_heads=5, vocab_size=67)
    plan = make_plan(tiny_config(**odd), SDPConfig(coverage=2 / 3), 3)
    results = run_workers(measure_state, dict(coverage=2 / 3), odd, world_size=3)
    assert sum(m["parameters"] for m, _ in results) == plan.full_numel * 4
    rows = sum(plan.shapes[n][-1] if len(plan.shapes[n]) > 1 else 1 for p in plan.held_parts(0) for n in p.ranges)
    rows += sum(
        plan.shapes[n][-1] if len(plan.shapes[n]) > 1 else 1 for n, s in plan.slices.items() if s[0].unit is None
    )
    assert all(m["parameters"] <= padded <= m["parameters"] + rows * 4 for m, padded in results)


@pytest.mark.parametrize("level", ["neuron", "block"])
def test_without_sharding_a_worker_stores_what_the_plan_says_to_the_byte(level):
    plan = make_plan(tiny_config(), SDPConfig(level=level, coverage=0.75), 4)
    results = run_workers(measure_state, dict(level=level, coverage=0.75, sharding="none"), {})
    for rank, (measured, _) in enumerate(results):
        held = plan.numel(rank) * 4
        assert measured == {"parameters": held, "gradients": held, "optimizer": 2 * held}


def count_collectives(config, micro_batches, model_options=None):
    """Bytes sent in the second step: as the engine counts, and as seen where torch.distributed is called."""
    seen, calls = [0], []

    def spied(name, sent):
        original = getattr(dist, name)

        def call(*args, **kwargs):
            group = kwargs.get("group")
            n = dist.get_world_size(group)
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            if tensors[0].numel() > 1:  # not the gradient norm
                seen[0] += sent(n, tensors)
                calls.append((name, tuple(dist.get_process_group_ranks(group))))
            return original(*args, **kwargs)

        return name, original, call

    def smaller(n, tensors):
        return (n - 1) * min(t.nbytes for t in tensors)

    spies = [
        spied(name, sent)
        for name, sent in {
            "all_gather_single": smaller, "all_gather_into_tensor": smaller,
            "reduce_scatter_single": smaller, "reduce_scatter_tensor": smaller,
            "all_reduce": lambda n, t: 2 * (n - 1) * t[0].nbytes // n,
        }.items() if hasattr(dist, name)
    ]  # fmt: skip
    accelerator, model, optimizer = prepared(config, model_options, gradient_accumulation_steps=micro_batches)
    one_step(accelerator, model, optimizer, micro_batches)
    before = get_state(model).traffic.bytes_sent
    try:
        for name, _, call in spies:
            setattr(dist, name, call)
        one_step(accelerator, model, optimizer, micro_batches)
    finally:
        for name, original, _ in spies:
            setattr(dist, name, original)
    return get_state(model).traffic.bytes_sent - before, seen[0], calls


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("config", [dict(), dict(level="block"), dict(sharding="none"), dict(coverage=0.75)], ids=str)
def test_bytes_sent_are_what_the_formula_says(config, micro_batches):
    """2·C·(r-1)/r of the maskable bytes and 2·(W-1)/W of the shared ones, however long the accumulation window."""
    thirds = dict(hidden_size=48, intermediate_size=96)  # divisible by 3 and 4: nothing is padded
    plan = make_plan(tiny_config(**thirds), SDPConfig(**config), 4)
    r, maskable = plan.replication[0], (plan.full_numel - plan.shared_numel) * 4
    formula = 2 * plan.coverage * (r - 1) / r * maskable + 2 * 3 / 4 * plan.shared_numel * 4
    for counted, seen, _ in run_workers(count_collectives, config, micro_batches, thirds):
        assert counted == seen == pytest.approx(formula, abs=1e-6)


def test_gathering_twice_is_the_only_extra_traffic_of_resharding():
    plan = make_plan(tiny_config(), SDPConfig(), 4)
    maskable = (plan.full_numel - plan.shared_numel) * 4
    plain, twice = (run_workers(count_collectives, dict(reshard_after_forward=r), 1)[0][0] for r in (False, True))
    assert maskable * plan.coverage / 2 <= twice - plain <= maskable * plan.coverage / 2 + plan.shared_numel * 3


@pytest.mark.parametrize(
    "config",
    [
        dict(coverage=0.75, reshard_after_forward=True),
        dict(level="block", reshard_after_forward=True),
        dict(level="block", coverage=0.75),
        dict(coverage=0.5),
    ],
    ids=str,
)
def test_order_of_collectives_is_one_global_order(config):
    """Two workers must issue the collectives of all groups they share in the same order, and all these orders must
    fit into one; else NCCL hangs, or pairs the wrong ones."""
    calls = [calls for _, _, calls in run_workers(count_collectives, config, 1, EVERYTHING)]
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


def accumulate_by_hand():
    """Gradients after two micro-batches: unsynchronized ones differ between workers, then the mean over holders."""
    accelerator, model, _ = prepared(dict(), optimizer=torch.optim.SGD)
    rank = dist.get_rank()
    with accelerator.no_sync(model):
        model(**batch(rank)).loss.backward()
        assert all(p.grad is None for p in get_state(model).parameters.values())
    try:
        with model.no_sync():
            raise KeyError
    except KeyError:
        pass
    model(**batch(4 + rank)).loss.backward()  # syncs although the block before raised
    assert all(p.grad is not None for p in get_state(model).parameters.values())
    name = "model.layers.0.mlp.up_proj.weight"
    held = get_state(model).held[name]
    return held.holders, held.start, local_tensor(get_state(model).parameters[name].grad)


def test_gradients_are_local_under_no_sync_and_the_mean_over_holders_after():
    results = run_workers(accumulate_by_hand)
    for holders in {h for h, _, _ in results}:
        expected = 0
        for worker in holders:
            local = patch_model(tiny_model(), SDPConfig(), rank=worker, world_size=4)
            for micro in (worker, 4 + worker):
                local(**batch(micro)).loss.backward()
            expected = expected + local.model.layers[0].mlp.up_proj.weight.grad / len(holders)
        shards = [results[worker][2] for worker in holders]  # rows, in the order of the holders
        torch.testing.assert_close(torch.cat(shards), expected, rtol=0, atol=1e-6)


def sync_each_batch(every: bool):
    from accelerate.utils import GradientAccumulationPlugin

    plugin = GradientAccumulationPlugin(num_steps=3, sync_each_batch=every)
    accelerator, model, optimizer = prepared(dict(), None, torch.optim.SGD, gradient_accumulation_plugin=plugin)
    one_step(accelerator, model, optimizer, 3)
    return consolidate(model)


def test_sync_each_batch_gives_the_same_step():
    rare, often = (run_workers(sync_each_batch, every)[0] for every in (False, True))
    for name in rare:
        torch.testing.assert_close(rare[name], often[name], rtol=0, atol=1e-6)


def same_start(config):
    """Every worker makes another model; rank 0's values must be everybody's."""
    accelerator = SDPAccelerator()
    model = accelerator.prepare(patch_model(tiny_model(seed=dist.get_rank()), SDPConfig(**config)))
    verify(model)
    owned = sum(numel(box) for pieces in owned_boxes(get_state(model)).values() for _, box in pieces)
    assert owned == get_state(model).plan.full_numel
    weights, again = consolidate(model), accelerator.get_state_dict(model)
    if weights is not None:
        assert weights.keys() == again.keys() and all(torch.equal(weights[n], again[n]) for n in weights)
        assert all(t.device.type == "cpu" for t in weights.values())
    return weights


@pytest.mark.parametrize(
    "config", [dict(), dict(level="block", coverage=0.75), dict(masking="backward"), dict(sharding="none")], ids=str
)
def test_consolidated_values_are_those_of_rank_0_bit_for_bit(config):
    results = run_workers(same_start, config)
    assert [r is None for r in results] == [False, True, True, True]
    expected = tiny_model(seed=0).state_dict()
    assert results[0].keys() == expected.keys()
    assert all(torch.equal(results[0][n], t) for n, t in expected.items())


def tamper(how: str):
    accelerator, model, _ = prepared(dict(sharding="none"))
    state = get_state(model)
    with torch.no_grad():
        if how == "replica" and dist.get_rank() == 2:
            local_tensor(state.parameters["model.norm.weight"].detach())[3] += 1e-7
        if how == "version" and dist.get_rank() == 2:
            state.version += 1
    try:
        verify(model)
    except SDPStateError as error:
        return str(error)


def test_verify_finds_the_first_difference_on_every_rank():
    for how, message in (
        ("replica", "model.norm.weight: replica differs"),
        ("version", "number of weight updates differs"),
    ):
        errors = run_workers(tamper, how)
        assert len(set(errors)) == 1 and message in errors[0]
    assert run_workers(tamper, "nothing") == [None] * 4


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


def load_other(folder):
    accelerator, model, optimizer = prepared(dict(level="block"))
    model.eval()
    model(**batch(0))  # something is gathered, and an evaluation copy exists
    load_weights(model, folder)
    weights = consolidate(model)
    logits = model(**batch(0)).logits.detach()
    try:
        load_weights(model, f"{folder}/missing")
    except SDPConfigError as error:
        return weights, logits, str(error)


def test_loading_reads_a_standard_checkpoint_bit_for_bit(tmp_path):
    other = tiny_model(seed=7).eval()
    other.save_pretrained(tmp_path, max_shard_size="50KB")
    results = run_workers(load_other, tmp_path)
    assert all(torch.equal(results[0][0][n], t) for n, t in other.state_dict().items())
    for _, logits, error in results:
        torch.testing.assert_close(logits, other(**batch(0)).logits, rtol=0, atol=1e-5)
        assert "neither model.safetensors nor" in error


def mixed_precision(config, dtype):
    accelerator, model, optimizer = prepared(config)
    seen = set()
    model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.add(args[0].dtype))
    one_step(accelerator, model, optimizer)
    model.eval()
    loss = model(**batch(0)).loss
    assert {p.dtype for p in get_state(model).parameters.values()} == {torch.float32}
    return seen, loss.item()


def test_fsdp2_mixed_precision():
    for config in (dict(level="neuron"), dict(level="block"), dict(masking="backward")):
        exact = run_workers(mixed_precision, config, None)
        mixed = run_workers(mixed_precision, {**config, "param_dtype": "bfloat16", "reduce_dtype": "float32"}, None)
        assert mixed[0][0] == {torch.bfloat16}
        assert mixed[0][1] == pytest.approx(exact[0][1], abs=3e-2) and mixed[0][1] != exact[0][1]
