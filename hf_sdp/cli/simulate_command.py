"""``hf-sdp simulate``."""

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from ..bench.quality.setting import TextSetting, text_name
from ..workload import MOST
from .errors import CommandError
from .extras import require_bench
from .folders import make_folder
from .models import MAX_LAYERS, make_meta_model
from .options import PositiveNumber, add_options, numbers, workers_option

_DEFAULT_METHODS = (
    "data-parallel,forward-neuron,forward-block,backward-neuron,backward-block,forward-neuron-linear@0.5,"
    "forward-block-linear@0.5,dropout@0.5,stochastic-depth@0.5,small@0.5"
)
MAX_PARAMETERS = 2**30
_COUNT = click.IntRange(1, 2**31)
_setting_options = add_options(
    click.option("--hidden", "hidden_size", type=_COUNT, default=TextSetting.hidden_size, help="Width of the Llama."),
    click.option("--mlp", "intermediate_size", type=_COUNT, default=TextSetting.intermediate_size, help="MLP neurons."),
    click.option(
        "--layers", "num_hidden_layers", type=click.IntRange(1, MAX_LAYERS), default=TextSetting.num_hidden_layers
    ),
    click.option("--heads", "num_attention_heads", type=_COUNT, default=TextSetting.num_attention_heads),
    click.option("--kv-heads", "num_key_value_heads", type=_COUNT, help="Key/value heads; default: as many as heads."),
    click.option(
        "--vocabulary",
        "vocab_size",
        type=click.IntRange(257, 2**31),
        default=TextSetting.vocab_size,
        help="BPE tokens.",
    ),
    click.option("--init-range", "initializer_range", type=PositiveNumber(), default=TextSetting.initializer_range),
    click.option(
        "--batch", type=click.IntRange(1, MOST), default=TextSetting.batch, help="Sequences of a worker's micro-batch."
    ),
    click.option(
        "--seq", "sequence", type=click.IntRange(1, MOST), default=TextSetting.sequence, help="Tokens of a sequence."
    ),
    click.option("--steps", type=_COUNT, default=TextSetting.steps, help="Optimizer steps of data parallel."),
    click.option(
        "--equal",
        type=click.Choice(["flops", "steps"]),
        default=TextSetting.equal,
        help="Every method costs what data parallel costs, or takes as many steps.",
    ),
    click.option(
        "--lr",
        "learning_rate",
        type=PositiveNumber(),
        default=TextSetting.learning_rate,
        help="Peak, of methods that name none and are not in --lr-sweep.",
    ),
    click.option(
        "--schedule",
        type=click.Choice(["stable", "cosine"]),
        default=TextSetting.schedule,
        help="Learning rate: constant, then linearly to zero over the last 20%; or cosine.",
    ),
    click.option("--evaluations", type=_COUNT, default=TextSetting.evaluations, help="Of the full model, over a run."),
    click.option(
        "--eval-sequences", type=_COUNT, default=TextSetting.eval_sequences, help="Held-out sequences of each."
    ),
)


@click.command()
@_setting_options
@workers_option
@click.option(
    "--methods",
    default=_DEFAULT_METHODS,
    help="With commas: FAMILY (at every --coverage) or FAMILY@COVERAGE. A family of SDP may go on with phases "
    "+CHANGE:SHARE and with a deal ~ORDERk, and any method with its own learning rate /RATE; see above.",
)
@click.option("--coverage", type=numbers(Sequence[float]), default="0.25,0.5,0.75", help="For methods that name none.")
@click.option("--seeds", type=numbers(Sequence[int]), default="0,1,2", help="One run of every method for each.")
@click.option(
    "--lr-sweep",
    type=numbers(Sequence[float]),
    help="At least three learning rates. Each method is tuned with the first seed; the others run at its best one.",
)
@click.option(
    "--text",
    "text_file",
    type=click.Path(exists=True, dir_okay=False),
    help="UTF-8; default: the source of Python's standard library.",
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of results.json, tables and plot.",
)
@click.option("--processes", type=click.IntRange(1), default=1, help="Runs at a time.")
@click.option(
    "--compile", "compiles", is_flag=True, help="torch.compile training: for long runs; needs a C++ compiler."
)
@click.option("--note", default="", help="Kept with every run: a commit, a machine.")
@click.option("--report", "report_only", is_flag=True, help="Train nothing: tables and plot of the runs in --output.")
def simulate(
    methods: str,
    coverage: tuple[float, ...],
    seeds: tuple[int, ...],
    lr_sweep: tuple[float, ...] | None,
    text_file: str | None,
    output: Path,
    processes: int,
    compiles: bool,
    note: str,
    report_only: bool,
    **shape,
) -> None:
    """Quality at equal FLOPs or equal steps: data parallel, SDP and baselines, N virtual workers in one process.

    Runs that --output has are not repeated, so the command can be stopped, and given more methods, seeds or rates.

    \b
    A method's name:
      forward-neuron@0.5                    static, coverage 0.5
      forward-neuron-linear@0.5+1:0.4       coverage 1 for the last 40% of the run's training FLOPs
      forward-neuron@0.25+0.5:0.6+1:0.2     0.5 for the last 60%, of which 1 for the last 20%
      forward-neuron@0.5+backward:0.4       backward masking for the last 40% (or block, linear, ...)
      forward-neuron@0.5~random50           units dealt anew at random every 50 steps (or rolling50: by one unit)
      small@0.5/0.008                       with a learning rate of its own
    """
    require_bench("simulate", "matplotlib", "datasets", "tokenizers")
    from ..bench.quality.report import show, write_report
    from ..bench.quality.results import Results

    results = Results(output)
    if not report_only:
        _train(results, methods, coverage, seeds, lr_sweep, text_file, processes, compiles, note, shape)
    elif not results.runs:
        raise CommandError(f"{results.path} has no runs to report.")
    show(results)
    write_report(results)


def _train(results, methods, coverage, seeds, lr_sweep, text_file, processes, compiles, note, shape) -> None:
    import datasets
    from rich.console import Console
    from transformers.utils import logging

    from ..bench import corpus
    from ..bench.quality.names import parse_methods
    from ..bench.quality.results import jobs_in_order, train_missing
    from ..bench.quality.sweep import jobs_at_best, tuning_jobs
    from ..bench.quality.training import course_of, train_on_text

    shape["num_key_value_heads"] = shape["num_key_value_heads"] or shape["num_attention_heads"]
    setting = TextSetting(**shape, text=text_name(text_file))
    if not seeds or min(seeds) < 0:
        raise CommandError(f"--seeds must be at least 0, got {seeds}.")
    seeds = tuple(dict.fromkeys(seeds))
    if lr_sweep is not None and (len(set(lr_sweep)) < 3 or not min(lr_sweep) > 0):
        raise CommandError(f"--lr-sweep must be at least three positive rates, got {lr_sweep}.")
    chosen = parse_methods(methods.split(","), coverage)
    numel = sum(p.numel() for p in make_meta_model(setting.model_config(), "these sizes").parameters())
    if numel > MAX_PARAMETERS:
        raise CommandError(f"The model has {numel} parameters, more than the {MAX_PARAMETERS} that one process trains.")
    for method in chosen:  # whatever cannot be built is said before the first run
        course_of(method, setting, seeds[0]) if method.is_sdp else method.build(setting, seeds[0])
    results.expect(setting)
    make_folder(results.path.parent)
    swept = [m for m in chosen if m.learning_rate is None] if lr_sweep else []
    first = tuning_jobs(swept, lr_sweep, seeds[0]) if swept else []
    first += jobs_in_order([m for m in chosen if m not in swept], seeds)
    rounds = [lambda: first, lambda: jobs_at_best(results, swept, seeds[1:])]
    num_jobs = len(first) + len(swept) * (len(seeds) - 1)
    console = Console(stderr=True)
    console.print(f"{num_jobs} runs, {sum(results.has(*job) for job in first)} of the first {len(first)} of them done.")
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as cache, console.status("preparing the text") as status:
        try:
            corpus.prepared(cache, setting.vocab_size, setting.sequence, text_file=text_file)
        except ValueError as error:
            raise CommandError(f"{text_file or setting.text}: {error}") from error
        done = 0

        def on_done(job, run):
            nonlocal done
            done += 1
            method, seed = job
            loss = run["curve"][-1][1]
            console.print(f"{method.name}, seed {seed}: {loss:.4f} after {run['steps']} steps, {run['seconds']:.0f} s")
            status.update(f"{done} runs done")

        status.update("0 runs done")
        train = functools.partial(train_on_text, setting=setting, text_file=text_file, cache=cache, compiles=compiles)
        for jobs in rounds:
            train_missing(results, jobs(), train, processes=processes, note=note, on_done=on_done)
