"""What hf_sdp has put in the place of something of transformers or accelerate, so that it can be taken back."""

from typing import Any

_MISSING: Any = object()
_replaced: list[tuple[Any, str, Any]] = []


def replace(owner: Any, name: str, value: Any) -> None:
    """Set an attribute of a module or class, until :func:`put_back`."""
    _replaced.append((owner, name, vars(owner).get(name, _MISSING)))
    setattr(owner, name, value)


def put_back() -> None:
    """Every attribute is what it was before; what a class has inherited it inherits again."""
    while _replaced:
        owner, name, value = _replaced.pop()
        if value is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, value)
