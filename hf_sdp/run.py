"""``accelerate launch ... -m hf_sdp.run --level block --coverage 0.5 script.py ...``: a script as it is, with SDP.

The script is neither edited nor need it import hf_sdp. Under ``torchrun`` likewise: ``torchrun ... -m hf_sdp.run ...``.
"""

import dataclasses
import functools
import importlib.util
import os
import runpy
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from .cli.errors import CommandError, refuse
from .cli.options import add_options, option_of
from .config import SDPConfig
from .errors import SDPConfigError
from .options import kind_of

_NAME = "hf_sdp.run"


def _options() -> list:
    """One for each of SDPConfig, without a default: the environment has what is not given."""
    made = []
    for field in dataclasses.fields(SDPConfig):
        is_bool = kind_of(field.type).element is bool
        settings: dict[str, Any] = {"is_flag": False, "type": click.BOOL} if is_bool else {}
        has_default = field.default not in (None, ())
        made.append(option_of(field, default=None, show_default=has_default and str(field.default), **settings))
    return made


@click.command(
    context_settings={"help_option_names": ["-h", "--help"], "allow_interspersed_args": False},
    epilog="Each option can also be a variable of the environment: HF_SDP_LEVEL=block.",
)
@add_options(*_options())
@click.option("--only", help="Pattern of the classes of models to train with SDP, where a script trains several.")
@click.option("--dry-run", is_flag=True, help="Stop when the model is known, and print its plan and what it takes.")
@click.option("--seq", type=click.IntRange(1), help="Tokens of a sequence, for --dry-run.")
@click.option("--compare", is_flag=True, help="20 steps with each of DDP, FSDP2 and SDP: a table of what they cost.")
@click.option("--measure", hidden=True, help="ENGINE:FILE, of the processes of --compare.")
@click.option("-m", "is_module", is_flag=True, help="SCRIPT is a module, as of python -m.")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(
    script: str,
    arguments: tuple[str, ...],
    is_module: bool,
    only: str | None,
    dry_run: bool,
    seq: int | None,
    compare: bool,
    measure: str | None,
    **options,
) -> None:
    """Run SCRIPT with its ARGUMENTS; the model that it hands to a Trainer or to accelerator.prepare is patched."""
    if not is_module and not Path(script).is_file():
        raise click.UsageError(f"There is no file {script}. Options of hf_sdp come before it, its own after it.")
    if is_module and not _is_there(script):
        raise click.UsageError(f"There is no module {script}.")
    if seq is not None and not dry_run:
        raise click.UsageError("--seq has no effect without --dry-run.")
    if compare and dry_run:
        raise click.UsageError("--compare has no effect with --dry-run. Leave one of them out.")
    from .hosts.environment import options_in_environment

    given = {name: value for name, value in options.items() if value is not None}
    try:
        config = SDPConfig(**{**options_in_environment(), **given})
    except SDPConfigError as error:
        raise click.UsageError(str(error)) from None
    if compare and config.coverage_schedule is not None:
        raise click.UsageError("--compare measures the steps of one plan. Give the coverage of one phase.")
    before: Any = functools.partial(_stop, config, seq) if dry_run else None
    if compare:
        from .bench.script import compare as compare_engines

        own = sys.argv[1 : len(sys.argv) - len(arguments)]  # the script may have an option of that name
        return compare_engines([*(argument for argument in own if argument != "--compare"), *arguments])
    if measure is not None:
        from .bench.script import config_of

        engine, _, file = measure.partition(":")
        before = functools.partial(_measure, engine != "ddp", Path(file))
        config = config_of(engine, config)
    from .hosts.adoption import enable

    adoption = enable(config, only=only, before=before)
    assert adoption is not None  # a config was given
    sys.argv = [script, *arguments]
    try:
        _run_as_main(script, is_module)
    except SystemExit as ended:  # sys.exit(main())
        if ended.code not in (None, 0):
            raise
    if not adoption.has_adopted:
        raise SDPConfigError(
            f"{script} has ended, and no model was trained with SDP: none that learns came to a transformers.Trainer "
            "or to Accelerator.prepare."
        )


def _run_as_main(script: str, is_module: bool) -> None:
    if is_module:
        runpy.run_module(script, run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that its package imports
        return False


def _measure(is_patched: bool, file: Path, model: Any, arguments: Any) -> bool:
    from .bench.script import Measured

    Measured(model, file)
    return is_patched


def _stop(config: SDPConfig, sequence: int | None, model: Any, arguments: Any) -> NoReturn:
    """Instead of patching a model, rank 0 prints what it would take, or why it cannot be; the script ends on all
    workers."""
    if os.environ.get("RANK", "0") == "0":
        from .cli.dry_run import show
        from .world.agreement import launched_workers

        try:
            show(model, config, config.simulate or launched_workers(), arguments, sequence)
        except (SDPConfigError, CommandError) as error:
            refuse(_NAME, str(error))
    sys.exit(0)


def main() -> None:
    """Bad options are one line on stderr and exit code 2; an error of the script is its own."""
    try:
        run.main(prog_name=f"python -m {_NAME}", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
    except click.ClickException as error:
        refuse(_NAME, error.format_message())


if __name__ == "__main__":
    main()
