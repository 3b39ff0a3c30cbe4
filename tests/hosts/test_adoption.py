"""Scripts as they are: the model that they hand to a Trainer or an Accelerator is patched there."""

import os
import re
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
import transformers.trainer
import transformers.trainer_jit_checkpoint
from transformers import LlamaForCausalLM

import hf_sdp
from hf_sdp import SDPConfig, SDPConfigError
from hf_sdp.hosts.environment import options_in_environment
from hf_sdp.model.state import find_state
from tests.support.models import batch, tiny_model
from tests.support.trainer import losses_of, make_trainer, train
from tests.support.workers import run_workers

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "tests" / "support" / "scripts"
REPLACED = (
    transformers.Trainer, transformers.trainer, transformers.trainer_jit_checkpoint, accelerate, accelerate.Accelerator,
)  # fmt: skip


def symbols() -> list[dict]:
    return [dict(vars(owner)) for owner in REPLACED]


def test_disable_takes_everything_back():
    hf_sdp.disable()  # of other tests in this process
    before = symbols()
    hf_sdp.enable(SDPConfig())
    changed = [
        {name for name in {*old, *new} if old.get(name) is not new.get(name)}
        for old, new in zip(before, symbols(), strict=True)
    ]
    assert {"__init__", "train", "_save"} <= changed[0] and "Accelerator" in changed[1] and changed[4] == {"__init__"}
    hf_sdp.disable()
    for old, new in zip(before, symbols(), strict=True):
        assert old.keys() == new.keys() and all(old[name] is new[name] for name in old)
    assert type(accelerate.Accelerator(cpu=True)) is accelerate.Accelerator
    hf_sdp.enable(SDPConfig())
    hf_sdp.disable()


def test_options_of_the_environment():
    values = options_in_environment(
        {"HF_SDP_LEVEL": "block", "HF_SDP_COVERAGE": "0.5,1", "HF_SDP_DEBUG": "1", "A": "b"}
    )
    assert values == {"level": "block", "coverage": (0.5, 1.0)}
    with pytest.raises(SDPConfigError, match="HF_SDP_COVERGE='1' is no option.*Did you mean HF_SDP_COVERAGE"):
        options_in_environment({"HF_SDP_COVERGE": "1"})
    with pytest.raises(SDPConfigError, match="HF_SDP_SEED: 'x' is not a whole number"):
        options_in_environment({"HF_SDP_SEED": "x"})
    schedule = "0:0.5, 0.6:0.5:masking=backward"
    values = options_in_environment({"HF_SDP_COVERAGE_SCHEDULE": schedule, "HF_SDP_COVERAGE_SCHEDULE_UNIT": "flops"})
    phases = [(0.0, 0.5), (0.6, dict(coverage=0.5, masking="backward"))]
    assert SDPConfig(**values) == SDPConfig(coverage_schedule=phases, coverage_schedule_unit="flops")
    with pytest.raises(SDPConfigError, match="HF_SDP_COVERAGE_SCHEDULE: 'half' is no phase. Write a schedule as"):
        options_in_environment({"HF_SDP_COVERAGE_SCHEDULE": "half"})


def test_a_schedule_of_the_command_line_goes_before_that_of_the_environment(monkeypatch):
    from hf_sdp import run
    from hf_sdp.hosts import adoption

    class NotReached(Exception):
        pass

    def enabled(config, **options):
        configs.append(config)
        raise NotReached

    configs: list[SDPConfig] = []
    monkeypatch.setattr(adoption, "enable", enabled)
    monkeypatch.setenv("HF_SDP_COVERAGE_SCHEDULE", "0:0.25,0.5:1")
    monkeypatch.setenv("HF_SDP_LEVEL", "block")
    for given in (["--coverage-schedule", "0:0.5,0.6:1"], []):
        monkeypatch.setattr(sys, "argv", ["run", *given, __file__])
        with pytest.raises(NotReached):
            run.main()
    own, of_environment = configs
    assert own == SDPConfig(level="block", coverage_schedule=[(0.0, 0.5), (0.6, 1.0)])
    assert of_environment == SDPConfig(level="block", coverage_schedule=[(0.0, 0.25), (0.5, 1.0)])


def train_unedited(folder, sdp: dict | None, own: dict | None):
    """``sdp``: given to enable; None: in the environment. ``own``: what the script itself asks for."""
    try:
        hf_sdp.enable(None if sdp is None else SDPConfig(**sdp))
        trainer = make_trainer(folder, own)
        trainer.train()
        return losses_of(trainer.state.log_history), find_state(trainer.model).held.config
    finally:
        hf_sdp.disable()


def test_a_trainer_is_that_of_a_patched_model_and_the_script_s_own_config_goes_first(tmp_path):
    config = dict(level="block", coverage=0.5)
    expected = losses_of(run_workers(train, tmp_path, config, world_size=2)[0][2])
    losses, used = run_workers(train_unedited, tmp_path, config, None, world_size=2)[0]
    assert losses == expected and used == SDPConfig(**config)
    assert run_workers(in_environment, tmp_path, world_size=2)[0] == (expected, SDPConfig(**config))
    losses, used = run_workers(train_unedited, tmp_path, dict(level="neuron"), config, world_size=2)[0]
    assert losses == expected and used == SDPConfig(**config)


def in_environment(folder):
    os.environ["HF_SDP_LEVEL"] = "block"
    try:
        return train_unedited(folder, None, None)
    finally:
        del os.environ["HF_SDP_LEVEL"]


def prepare_two(only: str | None, second: str):
    from accelerate import Accelerator  # as a script does it, before hf_sdp.enable

    hf_sdp.enable(SDPConfig(level="block"), only=only)
    try:
        accelerator = Accelerator()
        model = tiny_model()
        other = tiny_model() if second == "like it" else tiny_model(model_type="gpt2")
        if second == "frozen":
            other = tiny_model().requires_grad_(False).eval()
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other) if second != "frozen"]
        models = accelerator.prepare(model, other, *optimizers)[:2]
        if second == "frozen":
            optimizers = [accelerator.prepare(torch.optim.SGD(model.parameters(), lr=0.1))]
        for net, optimizer in zip(models, optimizers, strict=False):
            before = net(**batch(accelerator.process_index)).loss
            accelerator.backward(before)
            optimizer.step()
            assert net(**batch(accelerator.process_index)).loss < before
        return [find_state(m) is not None for m in models]
    finally:
        hf_sdp.disable()


@pytest.mark.parametrize(
    ("only", "second", "expected"),
    [
        ("Llama", "gpt2", [True, False]),
        ("Llama", "like it", [True, True]),
        pytest.param(None, "frozen", [True, False], marks=pytest.mark.long),
    ],
)
def test_of_several_models_those_that_match_are_patched_and_each_has_its_optimizer(only, second, expected):
    assert run_workers(prepare_two, only, second, world_size=2) == [expected] * 2


@pytest.mark.parametrize("second", ["gpt2", pytest.param("like it", marks=pytest.mark.long)])
def test_which_of_several_models_is_not_guessed(second):
    with pytest.raises(AssertionError, match="LlamaForCausalLM can learn. Say which of them SDP is for: --only"):
        run_workers(prepare_two, None, second, world_size=2)


def loop_of_a_script(follows: bool):
    """A script is not edited, and knows nothing of phases; one that is follows them."""
    hf_sdp.enable(SDPConfig(coverage_schedule=[(0.0, 0.5), (0.5, 1.0)]))
    try:
        accelerator, model = accelerate.Accelerator(), tiny_model()
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for step in range(2):
            if follows:
                accelerator.follow_schedule(step, 2)
            accelerator.backward(model(**batch(accelerator.process_index)).loss)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        hf_sdp.disable()


def test_a_loop_of_a_script_that_would_stay_in_the_first_phase_is_an_error():
    run_workers(loop_of_a_script, True, world_size=2)
    with pytest.raises(
        AssertionError,
        match="has a coverage_schedule that nobody follows.*accelerator.follow_schedule",
    ):
        run_workers(loop_of_a_script, False, world_size=2)


def prepare_on_rank_0_alone(what: str):
    from accelerate import Accelerator

    hf_sdp.enable(SDPConfig(level="block"))
    try:
        accelerator = Accelerator()
        if accelerator.is_main_process:
            accelerator.prepare(tiny_model())
        getattr(accelerator, what)(*([torch.ones(1)] if what == "gather" else []))
    finally:
        hf_sdp.disable()


@pytest.mark.parametrize("what", ["wait_for_everyone", pytest.param("gather", marks=pytest.mark.long)])
def test_a_model_that_rank_0_alone_prepares_is_an_error_at_once(what):
    with pytest.raises(AssertionError, match=f"all workers prepare.*rank 1 has gone on to accelerator.{what}"):
        run_workers(prepare_on_rank_0_alone, what, world_size=2, timeout_s=30)


def launch(*arguments: object, workers: int = 2, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", workers]
    everything = os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)) | environment
    command += ["-m", "hf_sdp.run", *arguments]
    return subprocess.run(map(str, command), capture_output=True, text=True, timeout=200, env=everything)


@pytest.mark.long
@pytest.mark.parametrize("script", ["causal_trainer.py", "loop.py"])
def test_an_existing_script_trains_with_sdp_and_saves_a_standard_model(tmp_path, script):
    options = [tmp_path]
    if script == "causal_trainer.py":
        options = [
            "--output_dir",
            tmp_path,
            "--use_cpu",
            "--max_steps",
            4,
            "--report_to",
            "none",
            "--save_strategy",
            "no",
        ]
    done = launch("--coverage", "0.5", SCRIPTS / script, *options, HF_SDP_LEVEL="block", HF_SDP_COVERAGE="1.0")
    assert done.returncode == 0, done.stdout + done.stderr
    loss = float(re.search(r"loss ([\d.]+)\n", done.stdout)[1])
    model = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(0, 64, (32, 16), generator=torch.Generator().manual_seed(0))[:8]
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(loss, abs=1e-5)
    assert (tmp_path / "state" / "sdp_plan.json").exists() or script != "loop.py"


@pytest.mark.long
def test_a_dry_run_prints_the_plan_and_the_estimate_and_trains_nothing(tmp_path):
    options = ["--output_dir", tmp_path / "out", "--use_cpu", "--max_steps", 4, "--report_to", "none"]
    done = launch("--level", "block", "--dry-run", SCRIPTS / "causal_trainer.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 subnetworks, block level" in done.stdout and "SDP, sharding none" in done.stdout
    assert done.stdout.count("worker graph") == 1 and "batch 8 x 64" in done.stdout  # rank 0 alone
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lvel", "block", "x.py"], "No such option"),
        (["no_such_script.py"], "There is no file no_such_script.py"),
        (["--seq", "4", __file__], "--seq has no effect without --dry-run"),
        (["--compare", "--dry-run", __file__], "--compare has no effect with --dry-run"),
        (["--compare", "--coverage-schedule", "0:0.5,0.5:1", __file__], "--compare measures the steps of one plan"),
        (["--coverage-schedule", "0:0.5,0.6", __file__], "'0.6' is no phase. Write a schedule as"),
        (["--coverage-schedule", "0.5:0.5", __file__], "coverage_schedule must begin at 0"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(arguments, message):
    done = subprocess.run([sys.executable, "-m", "hf_sdp.run", *arguments], capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.long
def test_a_script_in_which_nothing_is_trained_with_sdp_is_an_error(tmp_path):
    (tmp_path / "script.py").write_text("import torch, sys\nassert sys.argv == [__file__, '--a', 'b']\n")
    command = [sys.executable, "-m", "hf_sdp.run", "--level", "block", tmp_path / "script.py", "--a", "b"]
    done = subprocess.run(map(str, command), capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and "no model was trained with SDP" in done.stderr


@pytest.mark.long
def test_engines_are_compared_on_a_script(tmp_path):
    options = ["--output_dir", tmp_path, "--use_cpu", "--max_steps", 40, "--report_to", "none", "--save_strategy", "no"]
    done = launch("--compare", "--level", "block", SCRIPTS / "causal_trainer.py", *options, COLUMNS="120")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        row[0].strip(): list(map(float, row[1:4]))
        for row in re.findall(r"│ ([^│]+)│([^│]+)│([^│]+)│([^│]+)│", done.stdout)
    }
    ddp, fsdp2, sdp = rows["training loss, mean of the last 5 steps"]
    assert ddp == pytest.approx(fsdp2, abs=2e-3) and sdp != ddp
    assert rows["parameters, MiB"][0] > rows["parameters, MiB"][2]
    assert rows["sent per step, MiB"][0] > rows["sent per step, MiB"][2]
    assert all(seconds > 0 for seconds in rows["median step, s"])


def test_an_option_of_the_script_of_the_same_name_is_left_to_it(monkeypatch):
    from hf_sdp import run
    from hf_sdp.bench import script

    commands = []
    monkeypatch.setattr(script, "compare", commands.append)
    monkeypatch.setattr(sys, "argv", ["run", "--level", "block", "--compare", __file__, "--compare", "a"])
    run.main()
    assert commands == [["--level", "block", __file__, "--compare", "a"]]


IN_A_NOTEBOOK = """
import sys
from accelerate import notebook_launcher

def train():
    import hf_sdp
    hf_sdp.enable(hf_sdp.SDPConfig(level="block"))
    sys.path.insert(0, sys.argv[1])
    import launches
    launches.train()

notebook_launcher(train, num_processes=2)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "command",
    [
        ["-m", "hf_sdp.run", "--level", "block", SCRIPTS / "launches.py"],
        ["-c", IN_A_NOTEBOOK, SCRIPTS],
    ],
    ids=["debug_launcher", "notebook_launcher"],
)
def test_processes_that_are_forked_train_with_sdp(command):
    environment = os.environ | dict(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=200, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = re.search(r"parameters of the workers \[(\d+), (\d+)\]", done.stdout)
    assert numbers and all(int(number) < 0.8 * 54_432 for number in numbers.groups())


def unusual(what: str):
    """What a script does otherwise than most. Returns the losses of its model."""
    from accelerate import Accelerator as Made

    class Mine(Made):
        def prepare(self, *args, **options):
            self.asked = True
            return super().prepare(*args, **options)

    Accelerator = Mine if what == "a class of its own" else Made

    hf_sdp.enable(SDPConfig(level="block"))
    try:
        model = tiny_model()
        accelerator = Accelerator()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if what == "compiled":
            model = torch.compile(model)
        if what == "optimizer first":
            optimizer = accelerator.prepare(optimizer)
        model, optimizer = accelerator.prepare(model, optimizer)
        if what == "twice":
            assert accelerator.prepare(model) is model
            assert accelerator.prepare(model, optimizer) == (model, optimizer)
        assert Accelerator is Made or accelerator.asked
        losses = []
        for _ in range(2):
            losses.append(model(**batch(0)).loss)
            accelerator.backward(losses[-1])
            optimizer.step()
            optimizer.zero_grad()
        return [loss.item() for loss in losses]
    finally:
        hf_sdp.disable()


def test_a_model_that_is_prepared_twice_is_prepared_once_and_by_a_class_of_the_script_as_by_any():
    once = run_workers(unusual, "once", world_size=2)
    assert run_workers(unusual, "twice", world_size=2) == once and once[0][1] < once[0][0]
    assert run_workers(unusual, "a class of its own", world_size=2) == once


@pytest.mark.long
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("optimizer first", "SGD is prepared without a model that SDP trains. Prepare it with its model, or after it"),
        ("compiled", "LlamaForCausalLM is compiled.*leave compiling to the host: TrainingArguments.torch_compile=True"),
    ],
)
def test_what_cannot_be_trained_says_what_to_do(what, message):
    with pytest.raises(AssertionError, match=message):
        run_workers(unusual, what, world_size=2)


@pytest.fixture
def run_here(monkeypatch, tmp_path):
    """Runs ``hf_sdp.run`` in this process and an empty folder; every script is taken for one that trains a model."""
    import types

    from hf_sdp import run
    from hf_sdp.hosts import adoption

    found = types.SimpleNamespace(has_adopted=True)
    monkeypatch.setattr(adoption, "enable", lambda *args, **options: found)
    monkeypatch.chdir(tmp_path)

    def run_here(*arguments: str) -> None:
        monkeypatch.setattr(sys, "path", ["", *sys.path])  # of python -m hf_sdp.run
        monkeypatch.setattr(sys, "argv", ["run", "--level", "block", *arguments])
        run.main()

    run_here.found = found
    return run_here


SCRIPT = """
import argparse, multiprocessing, pickle, sys
from {beside} import VALUE

class Mine:
    pass

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--level", type=int)
    parser.add_argument("rest", nargs="*")
    options = parser.parse_args()
    assert pickle.loads(pickle.dumps(Mine)) is Mine and sys.modules["__main__"].Mine is Mine
    print(VALUE, options.level, options.rest, sys.argv[1:], __file__ == sys.argv[0])
"""


def test_a_script_has_its_arguments_its_folder_and_its_main_module(run_here, tmp_path, capsys):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "beside_script.py").write_text("VALUE = 'beside'")
    (tmp_path / "elsewhere" / "script.py").write_text(SCRIPT.format(beside="beside_script"))
    run_here("elsewhere/script.py", "--level", "3", "--", "-m", "x")
    expected = "beside 3 ['-m', 'x'] ['--level', '3', '--', '-m', 'x'] True\n"
    assert capsys.readouterr().out == expected


def test_a_module_of_a_package_imports_what_is_beside_it(run_here, tmp_path, capsys):
    package = tmp_path / "package_of_a_script"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "beside.py").write_text("VALUE = 'in the package'")
    (package / "train.py").write_text(SCRIPT.format(beside=".beside"))
    run_here("-m", "package_of_a_script.train", "--level", "3")
    assert capsys.readouterr().out == "in the package 3 [] ['--level', '3'] True\n"


@pytest.mark.parametrize("end", ["", "import sys; sys.exit()", "import sys; sys.exit(0)"])
def test_a_script_that_ends_without_a_model_is_an_error_however_it_ends(run_here, tmp_path, end):
    (tmp_path / "script.py").write_text(end)
    run_here.found.has_adopted = False
    with pytest.raises(SDPConfigError, match="no model was trained with SDP"):
        run_here("script.py")


def test_a_script_ends_with_its_own_exit_code(run_here, tmp_path):
    (tmp_path / "script.py").write_text("import sys; sys.exit(int(sys.argv[1]))")
    run_here("script.py", "0")
    for run_here.found.has_adopted in (True, False):
        with pytest.raises(SystemExit) as ended:
            run_here("script.py", "3")
        assert ended.value.code == 3


def test_a_module_that_is_not_there_is_one_line(run_here, capsys):
    with pytest.raises(SystemExit):
        run_here("-m", "package_of_nobody.train")
    assert "There is no module" in capsys.readouterr().err
