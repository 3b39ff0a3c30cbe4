"""The recipes of configs/accelerate/ for several machines: those are launchers here, at the same time on this one."""

import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.examples import EXAMPLES, ROOT, run

CONFIGS = ROOT / "configs" / "accelerate"
ACCELERATE = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
SDP = ["-m", "hf_sdp.run", "--level", "block", "--coverage", "0.5", EXAMPLES / "existing_script.py", "--max_steps", 3]
SDP += ["--save_strategy", "steps", "--save_steps", 3]  # the folder of a checkpoint has the plan


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def accelerate_commands() -> list[list]:
    shared = ["--config_file", CONFIGS / "cpu_2x2.yaml", "--main_process_port", free_port()]
    return [[*ACCELERATE, *shared, "--machine_rank", rank] for rank in range(2)]


def torchrun_commands() -> list[list]:
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "my-run"]
    return [[sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 2, *rendezvous]] * 2


@pytest.mark.long
@pytest.mark.parametrize("commands", [accelerate_commands, torchrun_commands])
def test_two_machines_train_one_model(tmp_path, commands):
    def of_machine(command: list) -> str:
        return run(*command, *SDP, "--output_dir", tmp_path / "out", folder=tmp_path, ACCELERATE_USE_CPU="true")

    with ThreadPoolExecutor() as machines:
        said = [*machines.map(of_machine, commands())]
    assert sum(text.count("evaluation loss") for text in said) == 1  # rank 0 of all four workers
    plan = json.loads((tmp_path / "out" / "checkpoint-3" / "sdp_plan.json").read_text())
    assert plan["num_subnetworks"] == 4


FAKES = {
    "scontrol": '[ "$*" = "show hostnames node[7-8]" ] && printf "127.0.0.1\\nnode8\\n"',
    # Both nodes at once; the options of srun end where its command begins.
    "srun": 'while [[ "$1" == --* ]]; do shift; done\n'
    'SLURM_NODEID=0 "$@" & first=$!\nSLURM_NODEID=1 "$@" & second=$!\nwait $first && wait $second',
}


def run_job(folder: Path, launcher: str, *arguments: object) -> subprocess.CompletedProcess:
    """slurm.sh as sbatch runs it on two nodes with two GPUs each. ``launcher``: what accelerate does."""
    tools = folder / "tools"
    tools.mkdir()
    for name, script in (FAKES | {"accelerate": launcher}).items():
        (tools / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tools / name).chmod(0o755)
    job = dict(SLURM_JOB_NODELIST="node[7-8]", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="2", SLURM_CPUS_PER_TASK="8")
    environment = os.environ | job | dict(PATH=f"{tools}:{os.environ['PATH']}", SLURM_JOB_ID=str(os.getpid()))
    environment |= dict(CONFIG=str(CONFIGS / "cpu_2x2.yaml"), ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT))
    environment.pop("OMP_NUM_THREADS", None)
    command = ["bash", CONFIGS / "slurm.sh", *arguments]
    return subprocess.run(
        [*map(str, command)], capture_output=True, text=True, timeout=250, env=environment, cwd=folder
    )


def test_a_job_launches_each_node_with_its_rank_and_the_first_one_s_address(tmp_path):
    done = run_job(tmp_path, 'echo "$OMP_NUM_THREADS | $*"', "-m", "hf_sdp.run", "a script.py", "--its")
    assert done.returncode == 0, done.stderr
    for rank, line in enumerate(sorted(done.stdout.splitlines(), key=lambda line: "--machine_rank 1" in line)):
        threads, arguments = line.split(" | ")
        assert threads == "4"
        assert f"--num_machines 2 --num_processes 4 --machine_rank {rank} --main_process_ip 127.0.0.1 " in arguments
        assert re.search(r"--main_process_port 2\d{4} -m hf_sdp.run a script.py --its$", arguments)
    assert rank == 1


def test_a_job_fails_when_a_node_does(tmp_path):
    assert run_job(tmp_path, '[[ "$*" != *"--machine_rank 1"* ]]', "script.py").returncode == 1


@pytest.mark.long
def test_a_job_trains(tmp_path):
    launcher = " ".join([*ACCELERATE, '"${@:2}"'])
    done = run_job(tmp_path, launcher, *SDP, "--output_dir", tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("evaluation loss") == 1 and (tmp_path / "out" / "model.safetensors").exists()
