"""The command ``hf-sdp``: one file per subcommand; ``options.py``, ``models.py`` and ``tables.py`` are what they share."""

import sys

import click

from ..errors import SDPConfigError, SDPStateError
from .compare_command import compare
from .errors import CommandError
from .estimate_command import estimate
from .plan_command import plan
from .simulate_command import simulate
from .verify_command import verify

commands = click.Group(
    "hf-sdp",
    help="Subnetwork Data Parallelism: see it before you launch it.",
    commands=[plan, estimate, compare, simulate, verify],
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command. Exits with 1 when what was run or checked failed, with 2 and one line on stderr for bad input."""
    try:
        code = commands.main(args=arguments, prog_name="hf-sdp", standalone_mode=False)
        if isinstance(code, int) and code:  # of context.exit(code)
            sys.exit(code)
    except (SDPConfigError, SDPStateError, CommandError) as error:
        _refuse(str(error))
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
    except click.ClickException as error:
        _refuse(error.format_message())
    except click.Abort:
        sys.exit(130)


def _refuse(message: str) -> None:
    print("hf-sdp: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(2)
