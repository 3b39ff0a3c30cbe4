"""A worker whose batch has an image, beside one whose batch has none."""

import pytest
import torch
import torch.distributed as dist

from hf_sdp import SDPAccelerator, SDPConfig, consolidate, patch_model
from tests.support.images import CONFIGS, TASK, text_and_image
from tests.support.models import tiny_model
from tests.support.oracle import freeze
from tests.support.workers import run_workers

MODEL = dict(task=TASK, model_type="llava", **CONFIGS["llava"])


def batch_of(rank: int) -> dict[str, torch.Tensor]:
    return text_and_image("llava", rank, with_image=rank == 0)


def step_of_workers(sdp: dict, frozen: tuple = ()):
    model = patch_model(freeze(tiny_model(**MODEL), frozen), SDPConfig(**sdp))
    accelerator = SDPAccelerator()
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.5))
    accelerator.backward(model(**batch_of(dist.get_rank())).loss)
    optimizer.step()
    return consolidate(model)


def step_of_virtual_workers(sdp: dict, frozen: tuple = ()):
    model = patch_model(freeze(tiny_model(**MODEL), frozen), SDPConfig(simulate=2, **sdp))
    for rank in range(2):
        (model(**batch_of(rank)).loss / 2).backward()
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    return consolidate(model)


@pytest.mark.parametrize(
    "sdp",
    [
        dict(level="block"),
        *(pytest.param(dict(level="neuron", masking=m), marks=pytest.mark.long) for m in ("forward", "backward")),
    ],
    ids=str,
)
def test_what_sees_learns_from_the_workers_that_have_images(sdp):
    found, expected = run_workers(step_of_workers, sdp, world_size=2)[0], step_of_virtual_workers(sdp)
    start = tiny_model(**MODEL).state_dict()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    seeing = next(name for name in expected if name.endswith("patch_embedding.weight"))
    assert not torch.equal(expected[seeing], start[seeing])


@pytest.mark.parametrize("sdp", [dict(level="block"), pytest.param(dict(), marks=pytest.mark.long)], ids=str)
def test_what_sees_is_frozen(sdp):
    frozen = ("model.vision_tower",)
    found = run_workers(step_of_workers, sdp, frozen, world_size=2)[0]
    start = tiny_model(**MODEL).state_dict()
    for name, tensor in step_of_virtual_workers(sdp, frozen).items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert not name.startswith(frozen) or torch.equal(tensor, start[name])
    projector = "model.multi_modal_projector.linear_1.weight"
    assert not torch.equal(found[projector], start[projector])
