"""Workers with different numbers of tokens: by which rule a unit's gradient is right."""

import pytest
import torch

from hf_sdp import SDPConfig, consolidate, patch_model
from hf_sdp.model.state import get_state
from hf_sdp.plan.region import view
from tests.support.models import tiny_model
from tests.support.trainer import make_trainer
from tests.support.workers import run_workers

ONE_STEP = dict(
    max_steps=1, gradient_accumulation_steps=2, optim="sgd", learning_rate=1.0, max_grad_norm=0, weight_decay=0.0
)


def one_step(folder, average: bool):
    """Plain SGD at learning rate 1: what the weights have lost is the gradient. Returns the batches as well."""
    trainer = make_trainer(folder, {}, {**ONE_STEP, "average_tokens_across_devices": average}, ragged=True)
    seen: list[dict] = []
    trainer.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(dict(kwargs)), with_kwargs=True)
    trainer.train()
    return seen, consolidate(trainer.model)


@pytest.mark.parametrize("average", [True, False])
def test_a_units_gradient_is_that_of_the_logged_loss_times_n_over_r(tmp_path, average):
    """By hand: what each worker's subnetwork makes of its own tokens, each token divided as in the loss that is logged
    (by the tokens of the world, or by those of its worker and the number of workers); summed over the holders of an
    element, and times N/r."""
    results = run_workers(one_step, tmp_path, average)
    counts = [[(batch["labels"][:, 1:] != -100).sum() for batch in batches] for batches, _ in results]
    assert len({sum(of_worker).item() for of_worker in counts}) == 4
    start = tiny_model().state_dict()
    sums = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    holders = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
    for rank, (batches, _) in enumerate(results):
        local = patch_model(tiny_model(), SDPConfig(), rank=rank, world_size=4)
        for batch, count in zip(batches, counts[rank], strict=True):
            divisor = batch.pop("num_items_in_batch") * (1 if average else 4)
            (local(**batch).loss * count / divisor).backward()
        for local_name, tensor in get_state(local).held.subnetwork.tensors.items():
            for box, gradient in tensor.region.views(local.get_parameter(local_name).grad):
                view(sums[tensor.region.name], box).add_(gradient)
                view(holders[tensor.region.name], box).add_(1)
    assert {count for tensor in holders.values() for count in tensor.unique().tolist()} == {2.0, 4.0}
    trained = results[0][1]
    for name, gradient in sums.items():
        expected = start[name] - gradient * 4 / holders[name]
        torch.testing.assert_close(trained[name], expected, rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
