"""One script in every life of a run, and the end that a scheduler asks for (SIGTERM)."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import hf_sdp
from hf_sdp import SDPConfigError, SDPStateError
from hf_sdp.checkpoint import marker
from hf_sdp.checkpoint.marker import check
from hf_sdp.hosts.preemption import AgreedJITCheckpoint
from tests.support.resume import NEURON, RUN
from tests.support.trainer import make_trainer
from tests.support.workers import run_workers

ROOT = Path(__file__).parents[2]


def live(folder, max_steps: int) -> int:
    """A life of the documented kind. Returns: the step at its end."""
    trainer = make_trainer(folder, NEURON, {**RUN, "max_steps": max_steps})
    return trainer.train(resume_from_checkpoint=hf_sdp.last_checkpoint(trainer.args.output_dir)).global_step


def count_compared(folder, resume) -> list[str]:
    """The files whose checksums this worker compares while a run is resumed."""
    compared, check_contents = [], marker._check_contents

    def count(folder, files):
        compared.extend(files)
        check_contents(folder, files)

    trainer = make_trainer(folder, NEURON, {**RUN, "save_strategy": "no", "max_steps": 7})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(marker, "_check_contents", count)
        trainer.train(resume_from_checkpoint=resume or hf_sdp.last_checkpoint(folder))
    return compared


def start_anew(folder) -> str:
    trainer = make_trainer(folder, NEURON, RUN)
    with pytest.raises(SDPConfigError) as raised:
        trainer.train()
    trainer = make_trainer(folder, NEURON, {**RUN, "save_strategy": "no", "max_steps": 1})
    assert trainer.train().global_step == 1  # it saves nothing
    trainer = make_trainer(f"{folder}/elsewhere", NEURON, RUN)
    for _ in range(2):  # a second training of the same process may replace what the first has saved
        assert trainer.train().global_step == 6
    return str(raised.value)


def ask_without_a_world(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "is_initialized", lambda: False)
        with pytest.raises(SDPStateError, match="make TrainingArguments first"):
            hf_sdp.last_checkpoint(folder)


def test_one_line_begins_goes_on_and_knows_the_end(tmp_path):
    (tmp_path / "runs").mkdir()  # what is no checkpoint is no hindrance
    (tmp_path / "checkpoint-99").mkdir()
    assert run_workers(live, tmp_path, 3, world_size=2) == [3, 3]
    assert run_workers(live, tmp_path, 6, world_size=2) == [6, 6]
    before = (tmp_path / "checkpoint-6" / "sdp_checkpoint.json").stat().st_mtime_ns
    assert run_workers(live, tmp_path, 6, world_size=2) == [6, 6]  # killed after its last checkpoint
    assert (tmp_path / "checkpoint-6" / "sdp_checkpoint.json").stat().st_mtime_ns == before
    for resume in (None, True, str(tmp_path / "checkpoint-6")):  # every file once, by one worker
        shares = run_workers(count_compared, tmp_path, resume, world_size=2)
        assert sorted(shares[0] + shares[1]) == sorted(check(tmp_path / "checkpoint-6")["files"])
    for error in run_workers(start_anew, tmp_path, world_size=2):
        assert "has checkpoint-3, checkpoint-6 of an earlier run" in error and "hf_sdp.last_checkpoint" in error
    run_workers(ask_without_a_world, tmp_path, world_size=2)


def train_until_sigterm(folder, rank: int, save_strategy: str) -> int:
    """Worker ``rank`` gets SIGTERM in step 2, others nothing. Returns: the step at which the training ends."""
    from transformers import TrainerCallback

    class Signalled(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2 and args.process_index == rank:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    arguments = {**RUN, "max_steps": 3000, "save_strategy": save_strategy, "enable_jit_checkpoint": True}
    trainer = make_trainer(folder, NEURON, {**arguments, "num_train_epochs": 1})
    next(
        c for c in trainer.callback_handler.callbacks if isinstance(c, AgreedJITCheckpoint)
    ).jit_manager.kill_wait = 0.3
    trainer.add_callback(Signalled())
    step = trainer.train(resume_from_checkpoint=hf_sdp.last_checkpoint(folder)).global_step
    assert signal.getsignal(signal.SIGTERM) == before
    return step


@pytest.mark.parametrize("save_strategy", [pytest.param("no", marks=pytest.mark.long), "epoch"])
def test_sigterm_to_one_worker_ends_all_after_the_same_step_with_a_checkpoint(tmp_path, save_strategy):
    steps = run_workers(train_until_sigterm, tmp_path, 1, save_strategy)
    assert 2 < steps[0] < 3000 and steps == [steps[0]] * 4
    newest = tmp_path / f"checkpoint-{steps[0]}"
    assert check(newest, contents=True)
    assert run_workers(live, tmp_path, steps[0] + 1) == [steps[0] + 1] * 4  # and goes on from there


@pytest.mark.long
def test_sigterm_to_the_launcher_ends_the_run_with_a_checkpoint(tmp_path):
    """As a scheduler does it: its agent sends SIGTERM on to all workers."""
    config = ROOT / "configs" / "accelerate" / "cpu_2.yaml"
    script = [ROOT / "examples" / "benchmarks" / "unattended.py", "--work", tmp_path, "--steps", "100000"]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config, *script]
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not all((tmp_path / f"alive-{rank}").is_file() for rank in range(2)):
            assert run.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        run.send_signal(signal.SIGTERM)
        run.wait(60)
    finally:
        run.kill()
    said = re.findall(r"SIGTERM: saving a checkpoint of step (\d+)", (tmp_path / "log").read_text())
    assert len(said) == 1, (tmp_path / "log").read_text()
    assert check(tmp_path / "run" / f"checkpoint-{said[0]}", contents=True)
    assert (tmp_path / "ended-0").read_text() == (tmp_path / "ended-1").read_text() == said[0]
