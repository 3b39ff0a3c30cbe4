"""Commands that need more than the core: the extra ``hf_sdp[bench]``."""

import importlib.util

from .errors import CommandError


def require_bench(command: str, *libraries: str) -> None:
    """Refuse ``command`` before any work when one of ``libraries`` is not installed. Nothing is imported.

    Raises: CommandError with the command that installs them.
    """
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise CommandError(f'{command} needs {library}: pip install "hf_sdp[bench]"')
