"""Files of checkpoints, read so that an error says which file it is and what is wrong with it.

Python's own ``exists`` and ``is_file`` answer "no" where they may not look: "no permission" would become "missing", and
a resumed run would begin anew.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import SDPConfigError, SDPStateError


def size_of(file: str | os.PathLike) -> int | None:
    """Bytes of a file (of a folder: some number); None when there is none.

    Raises: SDPConfigError when this process may not look there.
    """
    try:
        with reading(file):
            return os.stat(file).st_size
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def reading(file: str | os.PathLike) -> Iterator[None]:
    """Raises: SDPConfigError that names the file without permission, SDPStateError when it cannot be read for another
    reason. FileNotFoundError stays: what is missing means something else to every caller."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(str(file)) from error
    except PermissionError as error:
        raise SDPConfigError(
            f"{file} is there, or may be, but this process has no permission to read it (user {_user()}). Let the user "
            "who runs the workers read the checkpoint and its folder."
        ) from error
    except OSError as error:
        raise SDPStateError(f"{file} cannot be read: {error}.") from error


def _user() -> str:
    return str(os.geteuid()) if hasattr(os, "geteuid") else "unknown"


def read_json(file: Path) -> Any:
    """Raises: SDPStateError that names the file when it is missing or no JSON; else as :func:`reading`."""
    try:
        with reading(file):
            return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SDPStateError(f"{file} is missing.") from error
    except (ValueError, RecursionError) as error:
        raise SDPStateError(f"{file} cannot be read: {error}.") from error
