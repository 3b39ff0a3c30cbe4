"""What the command line refuses."""

import sys
from typing import NoReturn


class CommandError(ValueError):
    """Bad input of a subcommand: printed as one line, exit code 2."""


def refuse(program: str, message: str) -> NoReturn:
    """Say it in one line on stderr, and end the process with exit code 2."""
    print(f"{program}: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
