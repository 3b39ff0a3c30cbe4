"""Quantities with units on the command line: ``10Gbit``, ``25GB/s``, ``100TFLOPS``."""

import re

import click

_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15, "e": 1e18}
_NUMBER = r"(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*"


class Bandwidth(click.ParamType):
    """Bytes per second from bits (``10Gbit``, ``100Gbps``) or bytes (``25GB/s``, ``800MiB/s``)."""

    name = "bandwidth"
    _pattern = re.compile(
        _NUMBER + r"(?P<prefix>[kKMGT]?)(?P<binary>i?)(?P<unit>bit|Bit|b|B|bytes?|Bytes?)(?:/s|ps)?\Z"
    )

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        match = self._pattern.match(value.strip())
        if match is None:
            self.fail(f"{value!r} is no bandwidth. Write 10Gbit, 800Mbit or 25GB/s.", param, ctx)
        factor = _PREFIXES[match["prefix"].lower()]
        if match["binary"]:
            factor = {"k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}.get(match["prefix"].lower(), 1.0)
        bits = match["unit"] in ("b", "bit", "Bit")
        return _positive(self, float(match["number"]) * factor / (8 if bits else 1), value, param, ctx)


class Flops(click.ParamType):
    """FLOP/s: ``100e12``, ``100TFLOPS``, ``1.5PFLOP/s``."""

    name = "flop/s"
    _pattern = re.compile(_NUMBER + r"(?:(?P<prefix>[kmgtpe]?)flops?(?:/s)?)?\Z", re.IGNORECASE)

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        match = self._pattern.match(value.strip())
        if match is None:
            self.fail(f"{value!r} is no speed of computation. Write 100TFLOPS or 100e12.", param, ctx)
        factor = _PREFIXES[(match["prefix"] or "").lower()]
        return _positive(self, float(match["number"]) * factor, value, param, ctx)


def _positive(kind: click.ParamType, number: float, value: str, param, ctx) -> float:
    if not 0 < number < float("inf"):
        kind.fail(f"{value!r} must be positive.", param, ctx)
    return number
