"""When gradients are synchronized, what they are then, and in which precision."""

import pytest
import torch
import torch.distributed as dist

import hf_sdp
from hf_sdp import SDPConfig, SDPStateError, consolidate, patch_model
from hf_sdp.engine.sharded import find_sharded
from hf_sdp.model.state import get_state, local_tensor
from tests.support.models import batch, tiny_model
from tests.support.training import one_step, prepared
from tests.support.workers import run_workers


def accumulate_by_hand():
    """Gradients after two micro-batches: unsynchronized ones differ between workers, then the mean over holders."""
    accelerator, model, _ = prepared(dict(), optimizer=torch.optim.SGD)
    rank = dist.get_rank()
    with accelerator.no_sync(model):
        model(**batch(rank)).loss.backward()
        assert all(p.grad is None for p in find_sharded(model).parameters.values())
    try:
        with model.no_sync():
            raise KeyError
    except KeyError:
        pass
    model(**batch(4 + rank)).loss.backward()  # syncs although the block before raised
    assert all(p.grad is not None for p in find_sharded(model).parameters.values())
    name = "model.layers.0.mlp.up_proj.weight"
    tensor = get_state(model).held.subnetwork.tensors[name]
    return tensor.holders, local_tensor(find_sharded(model).parameters[name].grad)


def test_gradients_are_local_under_no_sync_and_the_mean_over_holders_after():
    results = run_workers(accumulate_by_hand)
    for holders in {h for h, _ in results}:
        expected = 0
        for worker in holders:
            local = patch_model(tiny_model(), SDPConfig(), rank=worker, world_size=4)
            for micro in (worker, 4 + worker):
                local(**batch(micro)).loss.backward()
            expected = expected + local.model.layers[0].mlp.up_proj.weight.grad / len(holders)
        shards = [results[worker][1] for worker in holders]  # rows, in the order of the holders
        torch.testing.assert_close(torch.cat(shards), expected, rtol=0, atol=1e-6)


def largest_gradient(model_options: dict) -> tuple[float, float]:
    """By the world, and the largest of this worker's shards."""
    accelerator, model, _ = prepared(dict(), model_options, torch.optim.SGD)
    model(**batch(dist.get_rank())).loss.backward()
    grads = [local_tensor(p.grad) for p in find_sharded(model).parameters.values()]
    assert any(g.numel() == 0 for g in grads) == (
        dist.get_rank() == 3
    )  # six rows of two each: the fourth worker has none
    norm = accelerator.clip_grad_norm_(model.parameters(), 1e9, norm_type=float("inf"))
    return norm.item(), max(g.abs().max().item() for g in grads if g.numel())


def test_the_infinity_norm_where_a_worker_stores_nothing_of_a_parameter():
    odd = dict(hidden_size=6, head_dim=2, num_attention_heads=2, num_key_value_heads=2)
    results = run_workers(largest_gradient, odd)
    assert {norm for norm, _ in results} == {max(largest for _, largest in results)}


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


def mixed_precision(config, dtype):
    accelerator, model, optimizer = prepared(config)
    seen = set()
    model.model.layers[0].register_forward_pre_hook(lambda m, args: seen.add(args[0].dtype))
    one_step(accelerator, model, optimizer)
    model.eval()
    loss = model(**batch(0)).loss
    assert {p.dtype for p in find_sharded(model).parameters.values()} == {torch.float32}
    return seen, loss.item()


def test_fsdp2_mixed_precision():
    for config in (dict(level="neuron"), dict(level="block"), dict(masking="backward")):
        exact = run_workers(mixed_precision, config, None)
        mixed = run_workers(mixed_precision, {**config, "param_dtype": "bfloat16", "reduce_dtype": "float32"}, None)
        assert mixed[0][0] == {torch.bfloat16}
        assert mixed[0][1] == pytest.approx(exact[0][1], abs=3e-2) and mixed[0][1] != exact[0][1]


def norms_of_parameters(sdp: dict):
    accelerator, model, _ = prepared(sdp, optimizer=torch.optim.SGD)
    norms = [hf_sdp.global_norm(model.parameters(), kind).item() for kind in (2.0, float("inf"))]
    loss = model(**batch(dist.get_rank())).loss
    with pytest.raises(SDPStateError, match="the shards of a prepared model"):
        hf_sdp.global_norm(model.parameters())
    loss.backward()
    full = consolidate(model)
    return norms, None if full is None else list(full.values())


@pytest.mark.parametrize("sdp", [dict(coverage=0.75), dict(level="block", sharding="none")], ids=["parts", "replicas"])
def test_the_norm_of_all_parameters(sdp):
    results = run_workers(norms_of_parameters, sdp)
    full = results[0][1]
    for norms, _ in results:
        for kind, norm in zip((2.0, float("inf")), norms, strict=True):
            assert norm == pytest.approx(torch.nn.utils.get_total_norm(full, kind).item(), rel=1e-5)
