"""Options that several subcommands share, made of the fields of ``SDPConfig`` and ``Workload``."""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import click

from ..config import MAX_WORLD, SDPConfig
from ..options import kind_of, parse
from ..workload import SHORT_DTYPES, Workload


class Text(click.ParamType):
    """A value that ``read`` makes of text. Its ValueError is a usage error."""

    def __init__(self, name: str, read: Callable):
        self.name, self.read = name, read

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        try:
            return self.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class PositiveNumber(click.FloatRange):
    """Above zero, and finite: click lets "nan" and "inf" through."""

    def __init__(self, most: float = 2.0**30):
        super().__init__(min=0, min_open=True, max=most)

    def convert(self, value, param, ctx):
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


def numbers(annotation) -> Text:
    """``0.75,0.5,0.25``, for a type such as ``Sequence[float]``."""
    return Text(f"{kind_of(annotation).element.__name__},...", partial(parse, annotation))


def add_options(*options: Callable) -> Callable:
    """One decorator of several options, shown in this order."""

    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


model_argument = click.argument("model")
workers_option = click.option(
    "--workers", "-n", type=click.IntRange(1, MAX_WORLD), default=8, help="Workers of the world."
)
json_option = click.option("--json", "as_json", is_flag=True, help="JSON on stdout instead of tables.")


def option_of(field: dataclasses.Field, *, flag: str | None = None, **settings) -> Callable:
    """The option of a field, by its name or as ``flag``. ``settings`` take the place of what the field says."""
    kind = kind_of(field.type)
    if kind.element is bool:
        made: dict[str, Any] = {"is_flag": True}
    else:
        default = None if field.default in (dataclasses.MISSING, ()) else field.default
        made = {"type": _click_type(field), "default": default}
    made["help"] = field.metadata["help"]
    return click.option(flag or f"--{field.name.replace('_', '-')}", field.name, **{**made, **settings})


def _click_type(field: dataclasses.Field) -> click.ParamType | type:
    kind = kind_of(field.type)
    if kind.choices:
        return click.Choice(kind.choices)
    if kind.is_list:
        return numbers(field.type)
    if kind.element is int and field.metadata["positive"]:
        return click.IntRange(1, field.metadata["most"])
    return kind.element


_SDP = {field.name: field for field in dataclasses.fields(SDPConfig)}
_WORKLOAD = {field.name: field for field in dataclasses.fields(Workload)}
_short_dtypes = click.Choice([*SHORT_DTYPES])
_DECIDES_THE_PLAN = (
    "level", "masking", "coverage", "coverage_schedule", "coverage_schedule_unit", "memory_gib", "min_replication",
    "balance", "depth_profile", "always_held", "block_granularity", "num_subnetworks", "seed",
)  # fmt: skip
sdp_options = add_options(*(option_of(_SDP[name]) for name in _DECIDES_THE_PLAN))
"""What decides a plan; the values are keyword arguments of :func:`sdp_config`."""
sharding_options = add_options(*(option_of(_SDP[name]) for name in ("sharding", "reshard_after_forward")))
"""How state is kept; keyword arguments of :func:`sdp_config` as well."""
workload_options = add_options(
    option_of(_WORKLOAD["batch"], default=1),
    option_of(_WORKLOAD["sequence"], flag="--seq", default=1024),
    option_of(_WORKLOAD["dtype"], type=_short_dtypes, default="bf16"),
    option_of(_WORKLOAD["param_dtype"], type=_short_dtypes, default="fp32"),
    option_of(_WORKLOAD["frozen_dtype"], type=_short_dtypes),
    option_of(_WORKLOAD["optimizer"]),
    option_of(_WORKLOAD["gradient_checkpointing"]),
)
"""The fields of ``Workload``, with the command line's own names and defaults; see :func:`pop_workload`."""


def pop_workload(options: dict) -> Workload:
    """The workload of ``workload_options``, which are taken out of ``options``."""
    return Workload(**{name: options.pop(name) for name in _WORKLOAD})


def sdp_config(*, workload: Workload | None = None, **options) -> SDPConfig:
    """The config of ``sdp_options`` and further fields. None keeps a default.

    ``workload`` is dropped where neither ``memory_gib`` nor what counts FLOPs uses it.
    """
    counts_flops = options.get("balance") == "compute" or options.get("coverage_schedule_unit") == "flops"
    if options.get("memory_gib") is not None or counts_flops:
        options["workload"] = workload
        if options.get("memory_gib") is not None and workload:
            if {workload.param_dtype, workload.dtype_of_frozen} != {workload.dtype}:
                options["param_dtype"] = workload.dtype  # gathered in the dtype of computation
    return SDPConfig(**{name: value for name, value in options.items() if value is not None})


def refuse_without_memory(context: click.Context, names: tuple[str, ...]) -> None:
    """An option that only ``--memory-gib`` makes use of is an error without it: it would change nothing."""
    if context.params["memory_gib"] is not None:
        return
    for name in names:
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name.replace('_', '-')} has no effect without --memory-gib.")
