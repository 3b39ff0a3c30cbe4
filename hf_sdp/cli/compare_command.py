"""``hf-sdp compare``."""

import dataclasses
import shlex
import sys
from pathlib import Path

import click
from click.core import ParameterSource
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn
from transformers import PretrainedConfig

from ..bench.compare import run
from ..bench.compare.contenders import BASELINES, Workplace, sdp_name
from ..bench.compare.plots import draw
from ..bench.compare.report import about, tables, write
from ..bench.small_llama import small_llama
from ..bench.workers import WorkerError
from ..config import SDPConfig
from ..options import parse_all
from ..workload import MOST, Workload
from .errors import CommandError
from .extras import require_bench
from .folders import make_folder
from .models import MAX_LAYERS, load_config, make_meta_model
from .options import PositiveNumber, add_options, sdp_config

_SIZES = dict(hidden_size=384, intermediate_size=1024, layers=8, heads=6, kv_heads=6, vocab_size=8192)
_DEFAULT_SDP = ("level=neuron,coverage=0.5", "level=block,coverage=0.5")
_SET_ELSEWHERE = ("workload", "simulate")
size_options = add_options(
    *(
        click.option(
            f"--{name.replace('_', '-')}",
            name,
            type=click.IntRange(1, MAX_LAYERS if name == "layers" else 2**31),
            help=f"Of the Llama. [default: {value}]",
        )
        for name, value in _SIZES.items()
    )
)


@click.command()
@click.option(
    "--model", help="A named size, a folder or config.json, or a hub name, instead of a Llama of these sizes:"
)
@size_options
@click.option("--workers", "-n", type=click.IntRange(1, 1024), default=4, help="Worker processes.")
@click.option("--batch", type=click.IntRange(1, MOST), default=2, help="Sequences of a worker's batch.")
@click.option("--seq", "sequence", type=click.IntRange(2, MOST), default=128, help="Tokens of a sequence.")
@click.option("--engines", default="ddp,ddp-checkpointing,fsdp2,fsdp2-no-reshard,sdp", help="Which to compare.")
@click.option(
    "--sdp",
    "variants",
    multiple=True,
    default=_DEFAULT_SDP,
    help="Options of SDPConfig, such as level=block,coverage=0.5,sharding=none. Repeat it for several variants.",
)
@click.option("--rounds", type=click.IntRange(1), default=10, help="Timed steps of every engine.")
@click.option("--warmup", type=click.IntRange(1), default=2, help="Steps before, which are not timed.")
@click.option("--loss-steps", type=click.IntRange(0), default=0, help="Train for so many steps and draw the losses.")
@click.option("--learning-rate", type=PositiveNumber(), default=1e-3, help="Of the loss curves.")
@click.option(
    "--throttle",
    "bandwidths",
    multiple=True,
    default=("none",),
    help="Limit of every worker's link, such as 1Gbit, or none. Repeat it to time steps on several networks. "
    "Needs root.",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", help="gloo, or NCCL with a GPU a worker.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16"]), default="fp32", help="bf16: autocast.")
@click.option("--output", type=click.Path(path_type=Path, file_okay=False), default="comparison", help="Folder.")
def compare(model, workers, batch, sequence, engines, variants, bandwidths, output, device, dtype, **options) -> None:
    """Measure DDP, DDP with activation checkpointing, FSDP2 and SDP on this machine, side by side.

    Starts the workers itself. Same model, same batch, same number of processes; steps of all engines are interleaved.
    Writes comparison.md, .csv and .json and plots: peak memory, step time (forward, backward, exposed communication,
    optimizer), bytes and number of collectives, and losses.
    """
    require_bench("compare", "matplotlib", "datasets", "tokenizers")
    sizes = {name: options.pop(name) for name in _SIZES}
    config = _model_config(model, sizes, sequence)
    full = make_meta_model(config, model or "these sizes")
    workplace = Workplace(model=config, workers=workers, batch=batch, sequence=sequence, device=device, dtype=dtype)
    chosen = _chosen(engines, variants, Workload(batch=batch, sequence=sequence))
    bandwidths = list(dict.fromkeys(bandwidths))
    run.check(chosen, workplace, bandwidths)
    make_folder(output)
    described = {
        "about": about(),
        "command": shlex.join(["hf-sdp", *sys.argv[1:]]),
        "what": _what(workplace, full),
        "model": config.to_diff_dict(),
    }
    console = Console(width=None if sys.stdout.isatty() else 150)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console) as bars:

            def on_stage(name: str, total: int):
                task = bars.add_task(name, total=total)
                return lambda: bars.advance(task)

            result = run.compare(
                chosen, workplace, bandwidths=bandwidths, on_stage=on_stage,
                on_result=lambda found: write({**described, **found}, output), **options,
            )  # fmt: skip
    except WorkerError as error:
        (output / "failure.txt").write_text(f"{error}\n")
        print(f"hf-sdp: {error.reason} (in full: {output / 'failure.txt'})", file=sys.stderr)
        sys.exit(1)
    _print_tables(console, result)
    pictures = draw(result, output)
    console.print(f"{output}: comparison.md, .csv, .json, {', '.join(path.name for path in pictures)}")


def _print_tables(console: Console, result: dict) -> None:
    for table in tables(result):
        shown = Table(title=table.title, caption=table.note, box=SIMPLE)
        for column in table.columns:
            shown.add_column(column, no_wrap=column == "engine", overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def _model_config(model: str | None, sizes: dict, sequence: int) -> PretrainedConfig:
    if model is not None:
        given = [f"--{name.replace('_', '-')}" for name, value in sizes.items() if value is not None]
        if given:
            raise CommandError(f"{', '.join(given)} have no effect with --model {model}. Leave one of them out.")
        config = load_config(model)
    else:
        if sizes["kv_heads"] is None:
            sizes["kv_heads"] = sizes["heads"]
        values = {name: sizes[name] or default for name, default in _SIZES.items()}
        if values["hidden_size"] % values["heads"] or values["heads"] % values["kv_heads"]:
            raise CommandError(
                f"--heads {values['heads']} must divide --hidden-size {values['hidden_size']}, and --kv-heads "
                f"{values['kv_heads']} the heads."
            )
        config = small_llama(
            vocab_size=values["vocab_size"],
            hidden_size=values["hidden_size"],
            intermediate_size=values["intermediate_size"],
            num_hidden_layers=values["layers"],
            num_attention_heads=values["heads"],
            num_key_value_heads=values["kv_heads"],
            max_position_embeddings=max(2048, sequence),
        )
    longest = getattr(config, "max_position_embeddings", sequence)
    if sequence > longest:
        raise CommandError(f"--seq {sequence} is longer than the model's {longest} positions.")
    config.use_cache = False
    return config


def _chosen(engines: str, variants: tuple[str, ...], workload: Workload) -> dict[str, SDPConfig | None]:
    asked = [name.strip() for name in engines.split(",")]
    for name in asked:
        if name not in (*BASELINES, "sdp"):
            raise CommandError(f"There is no engine {name!r}. Choose from {', '.join((*BASELINES, 'sdp'))}.")
    if "sdp" not in asked and click.get_current_context().get_parameter_source("variants") != ParameterSource.DEFAULT:
        raise CommandError(f"--sdp has no effect with --engines {engines}. Add sdp to the engines.")
    chosen: dict[str, SDPConfig | None] = {}
    for name in asked:
        if name != "sdp":
            chosen[BASELINES[name]] = None
            continue
        for text in variants:
            config = sdp_config(workload=workload, **parse_sdp(text))
            chosen[sdp_name(config)] = config
    return chosen


def parse_sdp(text: str) -> dict:
    """Options of SDPConfig from ``"level=block,coverage=0.5"``; a list goes on after commas: ``coverage=0.75,0.5``.

    Raises: SDPConfigError naming what is not understood.
    """
    fields = [field for field in dataclasses.fields(SDPConfig) if field.name not in _SET_ELSEWHERE]
    return parse_all(fields, text, what="--sdp", example="level=neuron,coverage=0.5")


def _what(workplace: Workplace, full: nn.Module) -> str:
    millions = sum(p.numel() for p in full.parameters()) / 1e6
    link = "over gloo, one thread each" if workplace.device == "cpu" else "over NCCL, one GPU each"
    return (
        f"{workplace.workers} workers {link}; {workplace.model.model_type} of {millions:.1f} M parameters; "
        f"{workplace.batch} x {workplace.sequence} tokens a worker and step; {workplace.dtype}; fused AdamW, clipping."
    )
