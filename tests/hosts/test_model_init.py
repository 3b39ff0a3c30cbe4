"""A Trainer that makes its model itself, once for every training; and other engines that are asked for beside SDP."""

import os

import pytest
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import HPSearchBackend

from hf_sdp import SDPAccelerator, SDPCallback, SDPConfig, SDPConfigError, consolidate, patch_model
from hf_sdp.model.state import find_state
from tests.support.models import tiny_model
from tests.support.trainer import ARGUMENTS, Rows, losses_of
from tests.support.workers import run_workers


def patched_model():
    return patch_model(tiny_model(), SDPConfig(level="block"))


def plain_model():
    return tiny_model()


def trainer_of(folder, callback: SDPCallback, **options):
    options = {"model_init": patched_model, **options}
    args = TrainingArguments(output_dir=str(folder), **ARGUMENTS)
    return Trainer(args=args, train_dataset=Rows(64), eval_dataset=Rows(8, seed=1), callbacks=[callback], **options)


class Search:
    """Two trials, as the backends run them on several workers: the same values everywhere."""

    def ensure_available(self):
        pass

    default_hp_space = None

    def run(self, trainer, n_trials, direction, **kwargs):
        objectives = []
        for rate in (1e-2, 1e-3):
            trainer.args.learning_rate = rate
            trainer.train(trial=None)
            objectives.append((losses_of(trainer.state.log_history), trainer.evaluate()["eval_loss"]))
        return objectives


def search(folder):
    import transformers.trainer as host

    trainer = trainer_of(folder, SDPCallback())
    backends = host.ALL_HYPERPARAMETER_SEARCH_BACKENDS
    kept, backends[HPSearchBackend.OPTUNA] = backends[HPSearchBackend.OPTUNA], Search
    try:
        trials = trainer.hyperparameter_search(backend="optuna", n_trials=2, hp_space=lambda trial: {})
    finally:
        backends[HPSearchBackend.OPTUNA] = kept
    alone = trainer_of(folder, SDPCallback(), model=patched_model(), model_init=None)
    alone.train()
    return trials, losses_of(alone.state.log_history), alone.evaluate()["eval_loss"], consolidate(trainer.model) is None


def test_a_model_init_that_patches_serves_every_trial(tmp_path):
    results = run_workers(search, tmp_path)
    (first, second), losses, loss, _ = results[0]
    assert first == (losses, loss)  # a trial is what it would be alone
    assert second != first and second[0][0] == first[0][0]  # another rate, from the same weights
    assert [trials for trials, *_ in results] == [results[0][0]] * 4


def unpatched_by_model_init(folder):
    messages = []
    with pytest.raises(SDPConfigError) as raised:
        trainer_of(folder, SDPCallback(), model_init=plain_model)
    messages.append(str(raised.value))
    trainer = trainer_of(folder, SDPCallback(SDPConfig()), model_init=plain_model)  # patches the first model only
    with pytest.raises(SDPConfigError) as raised:
        trainer.train()
    return [*messages, str(raised.value)]


def test_a_model_init_that_does_not_patch_is_an_error(tmp_path):
    for first, second in run_workers(unpatched_by_model_init, tmp_path):
        assert "is not patched" in first and "model_init must patch it" in second


def other_engines(folder):
    messages, model = [], tiny_model()
    args = TrainingArguments(output_dir=str(folder), **ARGUMENTS, fsdp=True)
    flag = "ACCELERATE_USE_FSDP"
    try:
        with pytest.raises(SDPConfigError) as raised:
            Trainer(model=model, args=args, callbacks=[SDPCallback(SDPConfig())])
        messages.append(str(raised.value))
        accelerator = SDPAccelerator(sdp_config=SDPConfig())  # the flag stays for the whole process
        with pytest.raises(SDPConfigError) as raised:
            accelerator.prepare(model)
        messages.append(str(raised.value))
        os.environ.pop(flag)
        flag = "ACCELERATE_USE_DEEPSPEED"
        os.environ[flag] = "true"  # DeepSpeed itself is not installed
        with pytest.raises(SDPConfigError) as raised:
            accelerator.prepare(model)
        messages.append(str(raised.value))
    finally:
        os.environ.pop(flag, None)
    assert find_state(model) is None
    return messages


def test_other_engines_are_refused_on_cpu_too(tmp_path):
    for messages in run_workers(other_engines, tmp_path):
        for message, name in zip(messages, ("FSDP", "FSDP", "DeepSpeed"), strict=True):
            assert message.startswith(f"{name} is configured")
