"""N worker processes against N virtual workers in one process: same data, same parameters, same norms."""

import pytest
import torch

from hf_sdp import SDPAccelerator, SDPConfig, consolidate, follow_schedule, patch_model, verify
from hf_sdp.families.layers import STATISTICS
from tests.support.models import batch_for, tiny_model
from tests.support.workers import run_workers

STEPS = 20
OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.2, momentum=0.9, weight_decay=0.01),
    "adamw": lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.01),
    "fused adamw": lambda params: torch.optim.AdamW(params, lr=3e-3, weight_decay=0.01, eps=1e-6, fused=True),
    "two groups": lambda params: torch.optim.SGD(two_groups(params), lr=0.2, momentum=0.9, weight_decay=0.01),
}
# AdamW's first steps amplify rounding where gradients are near zero.
TOLERANCE = {"sgd": 1e-5, "two groups": 1e-5, "adamw": 1e-4, "fused adamw": 1e-4}


def two_groups(params) -> list[dict]:
    params = list(params)
    norms = [p for p in params if p.dim() == 1]
    return [{"params": [p for p in params if p.dim() > 1]}, {"params": norms, "lr": 0.5, "weight_decay": 0.0}]


def freeze(model, prefixes: tuple):
    """Parameters of these names are not learned."""
    for name, parameter in model.named_parameters():
        if prefixes and name.startswith(prefixes):
            parameter.requires_grad_(False)
    return model


def train_workers(
    config: dict, model_options: dict, optimizer: str, accumulation: int, steps: int = STEPS, frozen: tuple = ()
):
    """One worker of the distributed run: its gradient norms, and on rank 0 the full weights."""
    import torch.distributed as dist

    rank, world_size = dist.get_rank(), dist.get_world_size()
    accelerator = SDPAccelerator(gradient_accumulation_steps=accumulation)
    # Another seed on every rank: rank 0's values are the ones that count.
    model = patch_model(freeze(tiny_model(seed=rank, **model_options), frozen), SDPConfig(**config))
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    norms, losses = [], []
    for step in range(steps):
        if "coverage_schedule" in config:
            accelerator.follow_schedule(step, steps)
        for micro in range(accumulation):
            with accelerator.accumulate(model):
                index = (step * accumulation + micro) * world_size + rank
                loss = model(**_inputs(model, index, model_options)).loss
                losses.append(loss.item())
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
                optimizer.step()
                optimizer.zero_grad()
    verify(model)
    return norms, losses, consolidate(model)


def train_oracle(
    config: dict,
    model_options: dict,
    optimizer: str,
    accumulation: int,
    world_size: int = 4,
    steps: int = STEPS,
    frozen: tuple = (),
    device: str = "cpu",
):
    config = {k: v for k, v in config.items() if k not in ("sharding", "reshard_after_forward", "num_subnetworks")}
    num_subnetworks = config.pop("simulate", world_size)
    full = freeze(tiny_model(seed=0, **model_options), frozen).to(device)
    model = patch_model(full, SDPConfig(simulate=num_subnetworks, **config))
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    norms, losses = [], []
    micro_batches = world_size * accumulation
    for step in range(steps):
        follow_schedule(model, step, steps)
        for micro in range(micro_batches):
            loss = model(**_inputs(model, step * micro_batches + micro, model_options)).loss
            losses.append(loss.item())
            (loss / micro_batches).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, losses, consolidate(model)


def _inputs(model, index: int, model_options: dict) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch_for(model, index, model_options.get("task")).items()}


def compare(
    config,
    model_options=None,
    optimizer="sgd",
    accumulation=1,
    world_size=4,
    steps=STEPS,
    oracle=None,
    frozen=(),
    device="cpu",
):
    model_options = model_options or {}
    arguments = (config, model_options, optimizer, accumulation, steps, frozen)
    results = run_workers(train_workers, *arguments, world_size=world_size, device=device)
    norms, losses, weights = train_oracle(
        {**config, **(oracle or {})}, model_options, optimizer, accumulation, world_size, steps, frozen, device
    )
    for worker_norms, _, _ in results:
        assert worker_norms == results[0][0]  # the same on every rank, bit for bit
        assert worker_norms == pytest.approx(norms, rel=1e-4)
    for rank, (_, worker_losses, _) in enumerate(results):
        assert worker_losses == pytest.approx(losses[rank::world_size], abs=1e-4)
    assert [r[2] is None for r in results] == [False] + [True] * (world_size - 1)
    trained = results[0][2]
    assert trained.keys() == weights.keys()
    fresh = freeze(tiny_model(seed=0, **model_options), frozen)
    start = fresh.state_dict()
    learned = {name for name, p in fresh.named_parameters(remove_duplicate=False) if p.requires_grad}
    changes = learned | {name for name in start if name.endswith(STATISTICS)}
    for name, expected in weights.items():
        if name.endswith("num_batches_tracked"):  # a simulation counts those of all workers
            continue
        if name not in changes:
            assert torch.equal(_bits(trained[name]), _bits(start[name])), name
            continue
        torch.testing.assert_close(
            trained[name], expected, rtol=0, atol=TOLERANCE[optimizer], msg=lambda m, n=name: f"{n}: {m}"
        )
        assert (start[name] - expected).abs().max() > 10 * TOLERANCE[optimizer]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """Packed weights may look like numbers that are none, which equal nothing."""
    return tensor.flatten().view(torch.uint8)
