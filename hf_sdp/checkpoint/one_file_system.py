"""All workers must see the same files: whether they do, before anything is written or loaded."""

import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from ..errors import SDPConfigError
from ..world.agreement import from_rank_0, of_everyone, raised_by_all

_LAG_S = 5.0  # how long a file that rank 0 has may be invisible elsewhere (caches of network file systems)


def refuse_unless_shared(folder: Path, group: dist.ProcessGroup | None) -> None:
    """Rank 0 writes a file into ``folder``, and all look for it. Collective. The file stays there.

    Raises: SDPConfigError on every worker that names the ranks which do not see it.
    """
    file, token = folder / "seen_by_all", from_rank_0(lambda: _write_token(folder / "seen_by_all"), group)

    def look() -> None:
        if file.read_text() != token:
            raise FileNotFoundError(f"{file} is another one here")

    refuse_unless_seen(look, folder, group)


def _write_token(file: Path) -> str:
    token = secrets.token_hex(8)
    file.write_text(token)
    return token


def refuse_unless_seen(look: Callable[[], None], folder: str | os.PathLike, group: dist.ProcessGroup | None) -> None:
    """``look`` raises on workers that do not see what rank 0 has seen in ``folder``. Collective.

    It is tried again for some seconds: on network file systems a new file may come to light late.
    Raises: SDPConfigError on every worker that names these ranks.
    """
    deadline = time.monotonic() + _LAG_S
    while True:
        try:
            look()
            problem = None
            break
        except Exception as error:  # whatever kind: rank 0 has seen it
            problem = str(error)
            if time.monotonic() > deadline:
                break
        time.sleep(0.05)
    everyone = of_everyone(problem, group)
    ranks = [rank for rank, theirs in enumerate(everyone) if theirs is not None]
    if ranks:
        raise raised_by_all(
            SDPConfigError(
                f"Ranks {ranks} do not see what rank 0 sees in {folder} (rank {ranks[0]}: {everyone[ranks[0]]}). All "
                "workers must see one file system: use a folder on one that every machine has mounted at this path. If "
                f"it is such a folder, its caches lag by more than {_LAG_S:g} s: mount it so that they do not (NFS: "
                "lookupcache=none, actimeo=1)."
            )
        )
