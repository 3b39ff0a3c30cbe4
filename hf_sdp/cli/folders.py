"""Folders that a command writes into."""

import os
from pathlib import Path

from .errors import CommandError


def make_folder(output: Path) -> None:
    """Make the folder of ``--output``, after all other checks and before any work.

    Raises: CommandError when it cannot be made or written to.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--output {output} cannot be made: {error.strerror}.") from error
    if not os.access(output, os.W_OK):
        raise CommandError(f"--output {output} cannot be written to.")
