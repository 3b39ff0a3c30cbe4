"""``HF_SDP_...``: options of SDPConfig in the environment of a script."""

import dataclasses
import difflib
import os
from collections.abc import Mapping

from .. import options
from ..config import SDPConfig
from ..engine.debug import VARIABLE
from ..errors import SDPConfigError

PREFIX = "HF_SDP_"
ONLY = f"{PREFIX}ONLY"
_OTHERS = (VARIABLE, ONLY)


def options_in_environment(environment: Mapping[str, str] | None = None) -> dict[str, object]:
    """Values of SDPConfig's options by name, as ``HF_SDP_LEVEL=block``. Lists are separated by commas.

    Raises: SDPConfigError for a name that is not known, and for a value that is not understood.
    """
    environment = os.environ if environment is None else environment
    fields = {PREFIX + field.name.upper(): field for field in dataclasses.fields(SDPConfig)}
    values: dict[str, object] = {}
    for name in sorted(environment):
        if not name.startswith(PREFIX) or name in _OTHERS:
            continue
        if name not in fields:
            near = difflib.get_close_matches(name, [*fields, *_OTHERS], 1)
            raise SDPConfigError(
                f"{name}={environment[name]!r} is no option of hf_sdp. "
                f"{f'Did you mean {near[0]}?' if near else f'They are {sorted([*fields, *_OTHERS])}.'}"
            )
        try:
            values[fields[name].name] = options.parse(fields[name].type, environment[name])
        except ValueError as error:
            raise SDPConfigError(f"{name}: {error}") from None
    return values
