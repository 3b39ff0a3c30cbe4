"""Options that several subcommands share, and the ``SDPConfig`` they make."""

from collections.abc import Callable

import click

from ..config import SDPConfig
from ..errors import SDPConfigError
from ..workload import OPTIMIZER_STATES, SHORT_DTYPES, Workload


class Numbers(click.ParamType):
    """``0.75,0.5,0.25``: a tuple of numbers."""

    def __init__(self, number: type):
        self.number = number
        self.name = f"{number.__name__},..."

    def convert(self, value, param, ctx):
        if not isinstance(value, str):
            return value
        try:
            return tuple(self.number(piece) for piece in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is no list of numbers separated by commas.", param, ctx)


def add_options(*options: Callable) -> Callable:
    """One decorator of several options, shown in this order."""

    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


model_argument = click.argument("model")
workers_option = click.option("--workers", "-n", type=click.IntRange(1), default=8, help="Workers of the world.")
json_option = click.option("--json", "as_json", is_flag=True, help="JSON on stdout instead of tables.")
sdp_options = add_options(
    click.option("--level", type=click.Choice(["neuron", "block"]), default="neuron", help="Unit that is held or not."),
    click.option("--masking", type=click.Choice(["forward", "backward"]), default="forward"),
    click.option(
        "--coverage",
        type=Numbers(float),
        default="0.5",
        help="Share a worker holds; or one for each subnetwork: 0.75,0.5,0.25.",
    ),
    click.option("--memory-gib", type=Numbers(float), help="Instead of coverage: memory of each subnetwork's worker."),
    click.option("--min-replication", type=click.IntRange(1), default=1, help="The fewest holders a unit may have."),
    click.option(
        "--balance",
        type=click.Choice(["memory", "compute"]),
        default="memory",
        help="What is balanced where units do not divide.",
    ),
    click.option(
        "--depth-profile", type=click.Choice(["uniform", "linear"]), default="uniform", help="Coverage over depth."
    ),
    click.option(
        "--always-held", type=Numbers(int), help="Layers every worker holds: 0,-1 for the first and the last."
    ),
    click.option("--block-granularity", type=click.Choice(["sub-block", "layer"]), default="sub-block"),
    click.option("--num-subnetworks", type=click.IntRange(1), help="Default: one for each worker."),
    click.option("--seed", type=int, default=0, help="Deals the subnetworks."),
)
"""What decides a plan; the values are keyword arguments of :func:`sdp_config`."""
sharding_options = add_options(
    click.option("--sharding", type=click.Choice(["full", "none"]), default="full", help="Of state among the holders."),
    click.option("--reshard-after-forward", is_flag=True, help="Gather again in backward: less memory, more traffic."),
)
"""How state is kept; keyword arguments of :func:`sdp_config` as well."""
workload_options = add_options(
    click.option("--batch", type=click.IntRange(1), default=1, help="Sequences of a worker's micro-batch."),
    click.option("--seq", "sequence", type=click.IntRange(1), default=1024, help="Tokens of a sequence."),
    click.option(
        "--dtype", type=click.Choice([*SHORT_DTYPES]), default="bf16", help="Of computation and gathered parameters."
    ),
    click.option("--param-dtype", type=click.Choice([*SHORT_DTYPES]), default="fp32", help="Of what is stored."),
    click.option("--optimizer", type=click.Choice([*OPTIMIZER_STATES]), default="adamw"),
    click.option("--gradient-checkpointing", is_flag=True, help="Recompute decoder layers in backward."),
)
"""Fields of :class:`~hf_sdp.workload.Workload`."""


def sdp_config(*, workload: Workload | None = None, **options) -> SDPConfig:
    """The config of ``sdp_options`` and further fields; None keeps a default.

    ``workload`` is dropped where neither ``memory_gib`` nor ``balance`` uses it.
    """
    coverage = options.get("coverage")
    if isinstance(coverage, tuple) and len(coverage) == 1:
        options["coverage"] = coverage[0]
    if options.get("memory_gib") is not None or options.get("balance") == "compute":
        options["workload"] = workload
        if options.get("memory_gib") is not None and workload and workload.dtype != workload.param_dtype:
            options["param_dtype"] = workload.dtype  # gathered in the dtype of computation
    return SDPConfig(**{name: value for name, value in options.items() if value is not None})


def num_subnetworks(config: SDPConfig, workers: int) -> int:
    """N of a world. Raises: SDPConfigError when it does not divide the workers."""
    if workers % (config.num_subnetworks or workers):
        raise SDPConfigError(f"--num-subnetworks {config.num_subnetworks} does not divide --workers {workers}.")
    return config.num_subnetworks or workers


def refuse_without_memory(context: click.Context, names: tuple[str, ...]) -> None:
    """An option that only ``--memory-gib`` makes use of is an error without it: it would change nothing."""
    if context.params["memory_gib"] is not None:
        return
    for name in names:
        if context.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT:
            raise click.UsageError(f"--{name.replace('_', '-')} has no effect without --memory-gib.")
