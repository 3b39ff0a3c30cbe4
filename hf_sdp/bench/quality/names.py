"""Methods from their names, and the order of a table's rows."""

from collections.abc import Sequence

from ...errors import SDPConfigError
from .methods import CHANGES, FAMILIES, ORDERS, SDP, Change, Method, Redeal


def sorted_runs(runs: dict[str, dict]) -> dict[str, dict]:
    """Method name -> its runs, in the order of ``FAMILIES``, then of coverage; schedules after what they begin with."""
    families = list(FAMILIES)

    def place(name: str) -> tuple:
        (method,) = parse_methods([name], ())
        return families.index(method.family), method.coverage or 1, len(method.changes), name

    return {name: runs[name] for name in sorted(runs, key=place)}


def parse_methods(names: Sequence[str], coverages: Sequence[float]) -> list[Method]:
    """Methods from names without a coverage (at each of ``coverages``) or with one, in this order, each once.

    Raises: SDPConfigError for an unknown family or a coverage that is no share.
    """
    found = []
    for name in map(str.strip, names):
        text, has_rate, rate = name.partition("/")
        (text, *changes) = text.split("+")
        text, has_redeal, redeal = text.partition("~")
        family, _, own = text.partition("@")
        if family not in FAMILIES:
            raise SDPConfigError(
                f"Unknown method {name!r}. Known: {', '.join(FAMILIES)}; with a coverage: forward-block@0.5."
            )
        if family not in SDP and (changes or has_redeal):
            raise SDPConfigError(f"{name!r}: only SDP has phases and deals anew. Use one of {', '.join(SDP)}.")
        if family == "data-parallel" and own:
            raise SDPConfigError(f"{name!r}: data-parallel has no coverage. Leave it out.")
        for coverage in [None] if family == "data-parallel" else [own] if own else coverages:
            method = Method(
                family,
                None if coverage is None else _share(name, coverage, f"{family}@0.5"),
                changes=_changes(name, changes),
                redeal=_redeal(name, redeal) if has_redeal else None,
                learning_rate=_number(name, rate, f"{family}/0.004") if has_rate else None,
            )
            if method.learning_rate is not None and not method.learning_rate > 0:
                raise SDPConfigError(f"{name!r}: the learning rate must be positive.")
            found.append(method)
    return list(dict.fromkeys(found))


def _changes(name: str, texts: list[str]) -> tuple[Change, ...]:
    found: list[Change] = []
    for text in texts:
        to, _, last = text.partition(":")
        share = _number(name, last, "+1:0.4")
        if not 0 < share < (found[-1].last if found else 1):
            raise SDPConfigError(
                f"{name!r}: {share:g} must be between 0 and 1, and less than that of the phase before: +1:0.4 is "
                "coverage 1 for the last 40% of the FLOPs."
            )
        if to not in CHANGES and not 0 < _number(name, to, "+1:0.4") <= 1:
            raise SDPConfigError(f"{name!r}: coverage {to} must be in (0, 1].")
        found.append(Change(to if to in CHANGES else float(to), share))
    return tuple(found)


def _redeal(name: str, text: str) -> Redeal:
    order = next((order for order in ORDERS if text.startswith(order)), None)
    if order is None or not text.removeprefix(order).isdecimal() or int(text.removeprefix(order)) < 1:
        raise SDPConfigError(f"{name!r}: {text!r} must be one of {', '.join(ORDERS)} and a number of steps: ~random50.")
    return Redeal(order, int(text.removeprefix(order)))


def _share(name: str, text: str | float, example: str) -> float:
    coverage = _number(name, text, example)
    if not 0 < coverage < 1:
        raise SDPConfigError(f"{name!r}: coverage {coverage:g} must be between 0 and 1; 1 is data-parallel.")
    return coverage


def _number(name: str, text: str | float, example: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SDPConfigError(f"{name!r}: {text!r} is no number. Write it as {example}.") from None
