"""The config of a module that is held in part."""

from typing import Any


class NarrowConfig:
    """A config in which some values are those of what is held. All others are read from the config itself, live."""

    def __init__(self, config: Any, values: dict[str, Any]):
        vars(self).update(_config=config, _values=values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        values = vars(self).get("_values", {})
        return values[name] if name in values else getattr(vars(self)["_config"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(vars(self)["_config"], name, value)
