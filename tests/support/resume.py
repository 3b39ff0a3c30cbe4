"""Runs that write checkpoints, and what is in them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

import hf_sdp
from hf_sdp import SDPConfig
from hf_sdp.checkpoint import tensors as boxes
from hf_sdp.checkpoint.marker import MARKER, OPTIMIZER, fingerprint
from hf_sdp.checkpoint.saved_optimizer import TENSORS
from hf_sdp.plan.region import Region
from tests.support.models import tiny_config
from tests.support.trainer import losses_of, make_trainer, norms_of

RUN = dict(
    max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=1, lr_scheduler_type="linear",
    warmup_steps=2,
)  # fmt: skip
NEURON = dict(level="neuron", coverage=0.5)
DROPOUT = dict(attention_dropout=0.1)  # random numbers of every worker matter


def train(folder, sdp, arguments=None, resume=None, model=None):
    """Weights are compared through the last checkpoint; what is returned is what was logged."""
    hf_sdp.enable()
    trainer = make_trainer(folder, sdp, {**RUN, **(arguments or {})}, {**DROPOUT, **(model or {})})
    trainer.train(resume_from_checkpoint=resume)
    return losses_of(trainer.state.log_history), norms_of(trainer.state.log_history)


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


def optimizer_of(folder) -> dict[str, torch.Tensor]:
    """Every tensor of the optimizer's state in full, by ``name/key``; of a plain checkpoint as well."""
    folder = Path(folder)
    if not (folder / OPTIMIZER).is_dir():
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        decay = [n for n, p in names_and_shapes() if len(p) > 1]
        names = decay + [n for n, p in names_and_shapes() if len(p) == 1]
        return {
            f"{names[i]}/{key}": value
            for i, state in saved["state"].items()
            for key, value in state.items()
            if value.dim() > 0
        }
    result, targets = {}, {}
    for name, (shape, dtype) in boxes.stored(folder / OPTIMIZER / TENSORS).items():
        result[name] = torch.empty(shape, dtype=dtype)
        targets[name] = boxes.Boxes(shape, dtype)
        targets[name].add(Region.whole(name, shape), result[name])
    boxes.read(folder / OPTIMIZER / TENSORS, targets, None)
    return result


def names_and_shapes():
    return hf_sdp.make_plan(tiny_config(), SDPConfig(), 4).shapes.items()


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]):
    assert a.keys() == b.keys() and a
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


def truncate(file: Path):
    file.write_bytes(file.read_bytes()[:-100])


def reseal(folder: Path, file: str, text: str):
    """A file of other content, which the marker has as it is now."""
    (folder / file).write_text(text)
    marker = json.loads((folder / MARKER).read_text())
    marker["files"][file] = fingerprint(folder / file)
    (folder / MARKER).write_text(json.dumps(marker))
