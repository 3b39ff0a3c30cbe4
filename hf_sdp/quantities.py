"""Quantities with units, read from text: ``10Gbit``, ``25GB/s``, ``100TFLOPS``."""

import re

from .errors import SDPConfigError

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_BINARY_PREFIXES = {"ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30, "ti": 2.0**40}
_NUMBER = r"(?P<number>(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*"
_BANDWIDTH = re.compile(
    _NUMBER + r"(?P<prefix>(?:[kmgt]i?)?)(?P<unit>bits?|bytes?|(?-i:[bB]))(?:/s|ps)?", re.IGNORECASE
)
_FLOPS = re.compile(_NUMBER + r"(?:(?P<prefix>[kmgtpe]?)flops?(?:/s)?)?", re.IGNORECASE)


def bits_per_second(text: str) -> float:
    """A bandwidth in bits (``10Gbit``, ``100Mbps``, ``2.5 Gbit/s``) or in bytes (``25GB/s``, ``800MiB/s``).

    Raises: SDPConfigError for anything else.
    """
    number, match = _number(text, _BANDWIDTH, "bandwidth", "10Gbit, 800Mbit or 25GB/s")
    is_bits = match["unit"] == "b" or match["unit"].lower().startswith("bit")
    return number if is_bits else 8 * number


def bytes_per_second(text: str) -> float:
    """As :func:`bits_per_second`, in bytes."""
    return bits_per_second(text) / 8


def flops_per_second(text: str) -> float:
    """A speed of computation: ``100e12``, ``100TFLOPS``, ``1.5PFLOP/s``. Raises: SDPConfigError for anything else."""
    return _number(text, _FLOPS, "speed of computation", "100TFLOPS or 100e12")[0]


def _number(text: str, pattern: re.Pattern, what: str, examples: str) -> tuple[float, re.Match]:
    """The number times its prefix."""
    match = pattern.fullmatch(text.strip())
    number = 0.0
    if match is not None:
        prefix = (match["prefix"] or "").lower()
        number = float(match["number"]) * (_PREFIXES | _BINARY_PREFIXES)[prefix]
    if match is None or not 0 < number < float("inf"):
        raise SDPConfigError(f"{text!r} is no {what}. Write a positive one, such as {examples}.")
    return number, match
