"""The command ``hf-sdp``: one file per subcommand. They share ``options.py``, ``models.py`` and ``tables.py``."""

import contextlib
import gc
import importlib
import sys
from collections.abc import Iterator

import click

from ..errors import SDPConfigError, SDPStateError
from .errors import CommandError, refuse

_NAME = "hf-sdp"
SHORT_HELPS = {
    "compare": "Measure DDP, DDP with activation checkpointing, FSDP2 and SDP on this machine, side by side.",
    "estimate": "Memory, traffic and step time, beside DDP, ZeRO and FSDP2.",
    "models": "Which model types of transformers work, and why others do not.",
    "plan": "Who holds what, how evenly, and what crosses the wire.",
    "simulate": (
        "Quality at equal FLOPs or equal steps: data parallel, SDP and baselines, N virtual workers in one process."
    ),
    "verify": "Check a checkpoint FOLDER: complete, shapes, plan, hashes.",
}
"""Subcommand -> first sentence of its help.

The command itself is in ``NAME_command.py``, which is imported when the command is called. So the list of commands is
shown without waiting for torch.
"""


@contextlib.contextmanager
def _import_without_collections() -> Iterator[None]:
    """What torch and transformers make on import stays. Looking for garbage in it, then and at exit, takes a second."""
    if "torch" in sys.modules:  # somebody else's process
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


class LazyGroup(click.Group):
    """The subcommands of ``SHORT_HELPS``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(SHORT_HELPS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in SHORT_HELPS:
            return None
        with _import_without_collections():
            return getattr(importlib.import_module(f".{cmd_name}_command", __name__), cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(SHORT_HELPS.items()))


commands = LazyGroup(
    _NAME,
    help="Subnetwork Data Parallelism: see it before you launch it.",
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command.

    Exits with 1 when what was run or checked failed, with 2 and one line on stderr for bad input.
    """
    try:
        code = commands.main(args=arguments, prog_name=_NAME, standalone_mode=False)
        if isinstance(code, int) and code:  # of context.exit(code)
            sys.exit(code)
    except (SDPConfigError, SDPStateError, CommandError) as error:
        refuse(_NAME, str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
    except click.ClickException as error:
        refuse(_NAME, error.format_message())
    except click.Abort:
        sys.exit(130)
