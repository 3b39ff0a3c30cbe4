"""Loss curves: the methods that are mathematically different, on the same tokens in the same order.

DDP with and without checkpointing, and FSDP2, compute the same. SDP computes the same however it is sharded, and with
coverage 1 it computes what DDP does. Hence there is one curve for all that is data parallel, and one for each SDP
config without its sharding. The loss is that of the full model on held-out tokens.
"""

import dataclasses
import math
from pathlib import Path

import torch
import torch.distributed as dist

from ...config import SDPConfig
from ..workers import progress
from .contenders import Contender, Workplace

SMALLEST_VOCABULARY = 512
"""Of a byte-level BPE worth the name; a model with less learns synthetic tokens."""
NUM_EVALUATIONS = 10


def curves(engines: dict[str, SDPConfig | None]) -> dict[str, list[str]]:
    """Engine that is trained -> engines whose curve it is, itself first."""
    found: dict[SDPConfig | None, list[str]] = {}
    for name, sdp in engines.items():
        method = sdp and dataclasses.replace(sdp, sharding="full", reshard_after_forward=False)
        if method is not None and method.coverage == 1:
            method = None
        found.setdefault(method, []).append(name)
    return {names[0]: names for names in found.values()}


def write_tokens(path: Path, workplace: Workplace, steps: int) -> str:
    """Write what is learned and evaluated to ``path``: ``{"train": (rows, sequence), "valid": (rows, sequence)}``.

    Returns: what it is: the source of Python's standard library, or synthetic tokens for a small vocabulary.
    """
    vocabulary, length = workplace.model.vocab_size, workplace.sequence
    rows = steps * workplace.workers * workplace.batch
    if vocabulary < SMALLEST_VOCABULARY:
        what = "synthetic tokens"
        made = _synthetic(vocabulary, length, rows + 4 * workplace.workers * workplace.batch)
        tokens = {"train": made[:rows], "valid": made[rows:]}
    else:
        from datasets import disable_progress_bars

        from ..corpus import load

        disable_progress_bars()
        data, _ = load(vocabulary, length, max_bytes=max(4 * 2**20, 5 * rows * length))
        tokens = {split: torch.tensor(data[split]["input_ids"]) for split in ("train", "valid")}
        what = "source of Python's standard library"
    torch.save(tokens, path)
    return what


def _synthetic(vocabulary: int, length: int, rows: int) -> torch.Tensor:
    """Each token is followed by one fixed other in three cases of four."""
    generator = torch.Generator().manual_seed(0)
    follower = torch.randperm(vocabulary, generator=generator)
    tokens = torch.randint(0, vocabulary, (rows, length), generator=generator)
    follows = torch.rand(rows, length, generator=generator) < 0.75
    for i in range(1, length):
        tokens[:, i] = torch.where(follows[:, i], follower[tokens[:, i - 1]], tokens[:, i])
    return tokens


def losses(
    name: str, sdp: SDPConfig | None, workplace: Workplace, tokens: str, steps: int, learning_rate: float
) -> dict[str, list[float]]:
    """Train an engine for ``steps`` steps on the tokens of :func:`write_tokens`: 10% warm-up, cosine to zero.

    Returns, the same on every worker: ``step``, the ``evaluation`` loss of the full model at it, and the mean
    ``training`` loss over the steps since the last one. Collective.
    """
    data = torch.load(tokens)
    engine = Contender(name, sdp, workplace, learning_rate)
    rank, size = dist.get_rank(), workplace.batch
    result: dict[str, list[float]] = {
        "step": [0],
        "evaluation": [_evaluate(engine, data["valid"], size)],
        "training": [],
    }
    since: list[torch.Tensor] = []
    every = max(1, steps // NUM_EVALUATIONS)
    warmup = max(1, steps // 10)
    for step in range(steps):
        share = min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warmup) / max(1, steps - warmup)))
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate * share
        rows = (torch.arange(size) + (step * workplace.workers + rank) * size) % len(data["train"])
        loss = engine.forward(data["train"][rows].to(engine.device))
        loss.backward()
        engine.update()
        since.append(loss.detach())
        if (step + 1) % every == 0 or step + 1 == steps:
            result["step"].append(step + 1)
            result["training"].append(_mean(torch.stack(since).mean()))
            result["evaluation"].append(_evaluate(engine, data["valid"], size))
            since = []
        progress()
    return result


@torch.no_grad()
def _evaluate(engine: Contender, rows: torch.Tensor, size: int, num_batches: int = 4) -> float:
    """Mean loss of the full model over up to ``num_batches`` batches a worker. Collective."""
    engine.model.eval()
    found = []
    for i in range(num_batches):
        chosen = (torch.arange(size) + (i * dist.get_world_size() + dist.get_rank()) * size) % len(rows)
        found.append(engine.forward(rows[chosen].to(engine.device)))
    engine.model.train()
    return _mean(torch.stack(found).mean())


def _mean(value: torch.Tensor) -> float:
    value = value.clone()
    dist.all_reduce(value)
    return (value / dist.get_world_size()).item()
