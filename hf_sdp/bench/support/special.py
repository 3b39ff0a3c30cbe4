"""What a model type needs besides tiny sizes."""

from typing import Any

SPECIAL: dict[str, dict[str, Any]] = {}
"""Model type -> arguments of its config. A dict goes into the values of the config of that name."""
