"""accelerator.save_state and load_state in a loop of one's own."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_sdp import SDPAccelerator, SDPConfig, SDPConfigError, SDPStateError, consolidate, patch_model
from hf_sdp.checkpoint.marker import MARKER
from hf_sdp.engine.gradients import GlobalGradScaler
from hf_sdp.engine.sharded import stored_tensors
from hf_sdp.model.state import local_tensor
from tests.support.models import batch, tiny_model
from tests.support.resume import assert_equal, optimizer_of, reseal
from tests.support.workers import run_workers

GROUPS_FILE = "sdp_optimizer/groups.json"


class Counter:
    """An object of the user's with state."""

    def __init__(self):
        self.value = 0

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def prepared(config, seed=0, **options):
    accelerator = SDPAccelerator(**options)
    model = tiny_model(seed=seed, attention_dropout=0.1)
    if config is not None:
        model = patch_model(model, SDPConfig(**config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    return accelerator, *accelerator.prepare(model, optimizer, scheduler)


def steps(accelerator, model, optimizer, scheduler, numbers) -> list[float]:
    losses = []
    for number in numbers:
        loss = model(**batch(number * dist.get_world_size() + dist.get_rank())).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def stop_and_replay(folder, config):
    accelerator, model, optimizer, scheduler = prepared(config)
    accelerator.scaler = GlobalGradScaler("cpu", init_scale=8.0)  # Accelerate has none on CPU
    counter = Counter()
    accelerator.register_for_checkpointing(counter)
    steps(accelerator, model, optimizer, scheduler, range(3))
    counter.value = 3
    accelerator.save_state(folder)
    first = steps(accelerator, model, optimizer, scheduler, range(3, 6)), consolidate(model)
    rate = scheduler.get_last_lr()
    counter.value = 6
    accelerator.scaler.update(1.0)
    accelerator.load_state(folder)
    assert counter.value == 3 and accelerator.scaler.get_scale() == 8.0
    again = steps(accelerator, model, optimizer, scheduler, range(3, 6)), consolidate(model)
    assert first[0] == again[0]
    if first[1] is not None:
        assert all(torch.equal(first[1][n], t) for n, t in again[1].items())
    assert scheduler.get_last_lr() == rate and rate[0] < 1e-2


@pytest.mark.parametrize("config", [dict(coverage=0.75), dict(level="block", masking="backward")], ids=str)
def test_what_follows_load_state_is_what_followed_save_state(tmp_path, config):
    run_workers(stop_and_replay, tmp_path / "state", config)
    saved = load_file(tmp_path / "state" / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "state").state_dict()
    assert all(torch.equal(loaded[n], t) for n, t in saved.items())


def save_plain(folder):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(**batch(0)).loss)
    optimizer.step()
    accelerator.save_state(folder)


def load_from_plain(folder, config):
    accelerator = SDPAccelerator()
    model = patch_model(tiny_model(seed=9), SDPConfig(**config))
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    accelerator.load_state(folder)
    accelerator.save_state(f"{folder}/again")
    return optimizer.param_groups[0]["lr"]


def test_a_plain_accelerators_state_is_loaded(tmp_path):

    run_workers(save_plain, tmp_path, world_size=1)
    assert run_workers(load_from_plain, tmp_path, dict(coverage=0.75)) == [1e-2] * 4
    first, again = (load_file(f / "model.safetensors") for f in (tmp_path, tmp_path / "again"))
    assert all(torch.equal(again[n], t) for n, t in first.items())
    plain = torch.load(tmp_path / "optimizer.bin", weights_only=True)["state"]
    names = [n for n, _ in tiny_model().named_parameters()]
    moved = optimizer_of(tmp_path / "again")
    assert len(moved) == 2 * len(names)
    for number, name in enumerate(names):
        assert all(torch.equal(moved[f"{name}/{key}"], plain[number][key]) for key in ("exp_avg", "exp_avg_sq"))


def automatic_names(folder):
    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(project_dir=str(folder), automatic_checkpoint_naming=True, total_limit=2)
    accelerator, model, optimizer, scheduler = prepared(dict(), project_config=project)
    for number in range(3):
        steps(accelerator, model, optimizer, scheduler, [number])
        accelerator.save_state()
    weights = consolidate(model)
    steps(accelerator, model, optimizer, scheduler, [3])
    accelerator.load_state()
    loaded = consolidate(model)
    assert weights is None or all(torch.equal(weights[n], t) for n, t in loaded.items())


def test_automatic_names_and_their_limit(tmp_path):
    run_workers(automatic_names, tmp_path)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["checkpoint_1", "checkpoint_2"]


def keep_what_is_not_ours(folder):
    accelerator, model, optimizer, scheduler = prepared(dict())
    for _ in range(2):
        accelerator.save_state(folder)
    with pytest.raises((OSError, SDPStateError)):
        accelerator.save_state(f"{folder}/notes.txt/state")  # cannot be made
    steps(accelerator, model, optimizer, scheduler, [0])


def test_other_files_in_the_folder_stay(tmp_path):
    (tmp_path / "state" / "logs").mkdir(parents=True)
    (tmp_path / "state" / "notes.txt").write_text("mine")
    (tmp_path / "state" / "logs" / "a").write_text("mine")
    run_workers(keep_what_is_not_ours, tmp_path / "state")
    assert (tmp_path / "state" / "notes.txt").read_text() == (tmp_path / "state" / "logs" / "a").read_text() == "mine"
    assert (tmp_path / "state" / "sdp_checkpoint.json").exists() and [p.name for p in tmp_path.iterdir()] == ["state"]


def refuse_what_does_not_fit(folder):
    """State of another optimizer, state that is not whole, and folders that lack something else."""
    accelerator, *prepared_objects = prepared(dict())
    steps(accelerator, *prepared_objects, [0])
    accelerator.save_state(folder / "good")
    name = "model.layers.1.mlp.up_proj.weight"

    def edit(change):
        def damage(copy):
            content = json.loads((copy / GROUPS_FILE).read_text())
            change(content)
            reseal(copy, GROUPS_FILE, json.dumps(content))

        return damage

    cases = [
        (edit(lambda c: c.update(optimizer="SGD")), "has the state of SGD, this run trains with AdamW"),
        (edit(lambda c: c["numbers"].pop(name)), rf"{name} has \['exp_avg', 'exp_avg_sq'\], others .* \['step'\]"),
        (edit(lambda c: c["groups"][0]["params"].remove(name)), rf"\['{name}'\] in none"),
        (edit(lambda c: c["groups"][0].update(lr="fast")), "lr='fast', this run's 0.00"),
        (edit(lambda c: c["groups"][0].update(betas=[0.9])), r"betas=\[0.9\]"),
        (edit(lambda c: c.update(numbers=[])), "groups.json is damaged: 'numbers' is missing, or no dict"),
        (lambda copy: (copy / "random_states_1.pkl").unlink(), "random_states_1.pkl is missing"),
        (lambda copy: drop(copy, "scheduler.bin"), "scheduler.bin is missing"),
    ]
    other, model, optimizer, scheduler = prepared(dict(), seed=9)
    steps(other, model, optimizer, scheduler, [5])
    before = everything(model, optimizer)
    for number, (damage, message) in enumerate(cases):
        copy = folder / f"damaged-{number}"
        if other.is_main_process:
            damage(shutil.copytree(folder / "good", copy))
        other.wait_for_everyone()
        with pytest.raises(SDPStateError, match=message):
            other.load_state(copy)
        assert_equal(before, everything(model, optimizer))
    other.register_for_checkpointing(Counter())
    with pytest.raises(SDPStateError, match="the state of 0 registered objects, this accelerator has 1"):
        other.load_state(folder / "good")
    assert_equal(before, everything(model, optimizer))


def everything(model, optimizer) -> dict[str, torch.Tensor]:
    """What this worker stores of weights and optimizer state."""
    found = {f"{region.name} {i}": t.clone() for i, (region, t) in enumerate(stored_tensors(model))}
    for i, state in enumerate(optimizer.optimizer.state.values()):
        found |= {f"{i}/{key}": local_tensor(value).clone() for key, value in state.items()}
    return found


def drop(folder, file: str):
    (folder / file).unlink()
    marker = json.loads((folder / MARKER).read_text())
    del marker["files"][file]
    (folder / MARKER).write_text(json.dumps(marker))


def load_into_another_model(folder):
    accelerator, *_ = prepared(dict())
    accelerator.save_state(folder)
    other = SDPAccelerator()
    model = other.prepare(patch_model(tiny_model(seed=9, rms_norm_eps=1e-5), SDPConfig()))
    before = consolidate(model)
    with pytest.raises(SDPConfigError, match="another model: rms_norm_eps=1e-06 there, 1e-05 here"):
        other.load_state(folder)
    after = consolidate(model)
    assert before is None or all(torch.equal(before[n], t) for n, t in after.items())


def test_a_state_of_another_config_changes_nothing(tmp_path):
    run_workers(load_into_another_model, tmp_path / "state")


def test_a_state_that_does_not_fit_changes_nothing(tmp_path):
    run_workers(refuse_what_does_not_fit, tmp_path)


def load_into_sgd(folder):
    accelerator = SDPAccelerator()
    model = patch_model(tiny_model(), SDPConfig())
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    before = everything(model, optimizer)
    with pytest.raises(
        SDPStateError, match=r"of another optimizer: its groups have \[.*'betas'.*run's SGD \['dampening'"
    ):
        accelerator.load_state(folder)
    assert_equal(before, everything(model, optimizer))


def load_into_another_order(folder):
    accelerator = SDPAccelerator()
    model = patch_model(tiny_model(), SDPConfig())
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(reversed(list(model.parameters()))))
    with pytest.raises(SDPStateError, match="not in the model's order"):
        accelerator.load_state(folder)


def test_a_plain_state_is_not_taken_in_another_order(tmp_path):
    run_workers(save_plain, tmp_path, world_size=1)
    run_workers(load_into_another_order, tmp_path)
    run_workers(load_into_sgd, tmp_path)


def fail_once(folder):
    import resource

    from accelerate.utils import ProjectConfiguration

    project = ProjectConfiguration(project_dir=str(folder), automatic_checkpoint_naming=True)
    accelerator, *prepared_objects = prepared(dict(), project_config=project)
    steps(accelerator, *prepared_objects, [0])
    timeout = dist.distributed_c10d._get_default_store().timeout
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        with pytest.raises(Exception):  # noqa: B017, the kind is that of whoever wrote
            accelerator.save_state()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    accelerator.save_state()
    assert dist.distributed_c10d._get_default_store().timeout == timeout


def test_after_a_save_that_failed_the_next_one_works(tmp_path):
    run_workers(fail_once, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["checkpoint_0"]


def save_on_one_rank(folder):
    accelerator, model, optimizer, scheduler = prepared(dict())
    if accelerator.is_main_process:
        with pytest.raises(SDPStateError, match="has gone on to a forward in training mode"):
            accelerator.save_state(folder)
    return steps(accelerator, model, optimizer, scheduler, [0])


def test_saving_on_one_rank_only_is_an_error_there(tmp_path):
    run_workers(save_on_one_rank, tmp_path / "state")
    assert not (tmp_path / "state").exists()


def with_names(folder, made: str):
    """An optimizer of ``model.named_parameters()``: its groups have the names of what this worker trains."""
    accelerator, model = SDPAccelerator(), tiny_model()
    names_of_full = list(model.named_parameters())
    model = patch_model(model, SDPConfig(level="block", coverage_schedule=[(0.0, 0.5), (0.5, 1.0)]))
    named = names_of_full if made == "before patching" else model.named_parameters()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(named, lr=1e-2))
    for phase in range(2):
        accelerator.follow_schedule(phase, 2)
        accelerator.backward(model(**batch(dist.get_rank())).loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.save_state(folder / str(phase))
        before = [state["exp_avg"].clone() for state in optimizer.state.values()]
        accelerator.load_state(folder / str(phase))
        after = [state["exp_avg"] for state in optimizer.state.values()]
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
        (group,) = optimizer.param_groups
        found = zip(group["param_names"], group["params"], strict=True)
        assert [(name, id(p)) for name, p in found] == [(name, id(p)) for name, p in model.named_parameters()]


@pytest.mark.parametrize("made", ["after patching", pytest.param("before patching", marks=pytest.mark.long)])
def test_an_optimizer_of_named_parameters_has_the_names_of_what_it_trains(tmp_path, made):
    run_workers(with_names, tmp_path, made, world_size=2)
