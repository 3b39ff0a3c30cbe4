"""How numbers are shown in tables."""

import sys

from rich.console import Console


def console() -> Console:
    """Stdout; in a file or a pipe lines have 120 columns, whatever the terminal of the caller is."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def short(value: float, unit: str = "") -> str:
    """``1.23 G`` for 1.23e9: three digits and a decimal prefix."""
    for prefix in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5 or prefix == "T":
            return f"{value:.3g} {prefix}{unit}".strip()
        value /= 1000
    raise AssertionError


def short_bytes(value: float) -> str:
    """``1.5 GiB``: binary prefixes."""
    for prefix in ("", "Ki", "Mi", "Gi", "Ti"):
        if abs(value) < 1023.5 or prefix == "Ti":
            return f"{value:.4g} {prefix}B"
        value /= 1024
    raise AssertionError
