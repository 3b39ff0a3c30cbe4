"""One run: a method, a seed, under the plain Trainer.

All methods see the same rows a step, in the same order, with the same learning rate and a schedule over their own
length. FLOPs are those of matrix products and convolutions in forward and backward, attention included; evaluation is
not counted. A subnetwork of coverage C costs more than C of the full model, since embeddings and head are not cut.
"""

import functools
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import date
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, Trainer, TrainingArguments, default_data_collator

from ...model.stacked import is_stacked
from ...model.state import find_state
from ...model.statistics import batch_norms
from ...plan.plan import Plan
from .. import corpus
from . import overshoot
from .baselines import expected_flops
from .methods import Method
from .phases import Course
from .setting import Setting, TextSetting

DATA_PARALLEL = Method("data-parallel", None)


def step_flops(model: nn.Module, setting: Setting) -> float:
    """FLOPs of forward and backward of one step's micro-batches; expected ones where blocks are skipped at random."""
    batch, calls, workers = setting.example(), 1, setting.workers
    if is_stacked(model):
        batch, workers = {name: torch.cat([t] * setting.workers) for name, t in batch.items()}, 1
    elif find_state(model) is not None:
        calls = setting.workers

    def count() -> int:
        # The fused CPU attention is not known to the counter.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            for _ in range(calls):
                model(**batch).loss.backward()
        return counter.get_total_flops()

    model.train()
    flops = expected_flops(model, count) * workers / calls
    model.zero_grad()
    return flops


def number_of_steps(method: Method, setting: Setting, flops: float, seed: int) -> int:
    """Steps of ``flops`` each that cost what ``setting.steps`` of data parallel cost; a multiple of the evaluations."""
    if setting.equal == "steps" or method == DATA_PARALLEL:
        return setting.steps
    budget = setting.steps * step_flops(DATA_PARALLEL.build(setting, seed), setting)
    return max(1, round(budget / flops / setting.evaluations)) * setting.evaluations


def course_of(method: Method, setting: Setting, seed: int) -> Course:
    """Of a method of SDP. Raises: SDPConfigError when it cannot be met with this model and number of workers."""
    return Course.of(method, setting, seed, lambda model: step_flops(model, setting))


MakeTrainer = Callable[[nn.Module, TrainingArguments], Trainer]
"""Of a model and the run's arguments, with the data. It evaluates the full model."""


def train(
    method: Method,
    seed: int,
    setting: Setting,
    make_trainer: MakeTrainer,
    other_curves: Sequence[str] = (),
    *,
    scales_branches: bool = False,
    compiles: bool = False,
) -> dict:
    """One run on this machine.

    Args:
        other_curves: metrics of the evaluation which are kept beside its loss, under their own names.
        compiles: compile the forward and backward of training.
        scales_branches: keep also the final losses with scaled branches (``overshoot.py``).
    Returns: ``parameters`` (of one worker's model, mean over workers; of the largest phase), ``steps``, ``step_flops``
        (mean over steps), ``curve`` ([step, evaluation loss of the full model] pairs), ``phases`` where there are
        several ([first step, FLOPs of its steps] pairs), ``scaled`` (scale of the branches -> loss), ``learning_rate``,
        ``seconds`` and what it ran on.
    """
    course = course_of(method, setting, seed) if method.is_sdp else None
    flops = course.mean_cost if course else step_flops(method.build(setting, seed), setting)
    steps = number_of_steps(method, setting, flops, seed)
    every = steps // setting.evaluations
    if course:
        model, callback = course.prepared(setting, steps)
        at_once = course.is_stacked
    else:
        model = method.build(setting, seed)
        at_once = method.treats_workers_alike and not batch_norms(model)  # a batch norm sees one worker's rows
    micro_batches = 1 if at_once else setting.workers
    learning_rate = method.learning_rate or setting.learning_rate
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=steps, seed=seed, learning_rate=learning_rate,
            **schedule(setting.schedule, steps), weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0,
            per_device_train_batch_size=setting.batch * setting.workers // micro_batches,
            gradient_accumulation_steps=micro_batches, per_device_eval_batch_size=16, eval_strategy="steps",
            eval_steps=every, logging_steps=every, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        if compiles:
            compile_training(model)
        trainer = make_trainer(model, args)
        if course:
            trainer.add_callback(callback)
        trainer.remove_callback(PrinterCallback)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started

    def curve(metric: str) -> list[tuple[int, float]]:
        return [(entry["step"], entry[metric]) for entry in trainer.state.log_history if metric in entry]

    run: dict[str, Any] = {
        "parameters": max(map(mean_numel, course.plans)) if course else sum(p.numel() for p in model.parameters()),
        "steps": steps,
        "step_flops": flops,
        "curve": curve("eval_loss"),
        **{metric: curve(metric) for metric in other_curves},
        "learning_rate": learning_rate,
        "seconds": round(seconds, 1),
        "date": date.today().isoformat(),
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
    }
    if course and len(course.plans) > 1:
        run["phases"] = list(zip(course.first_steps(steps), course.costs, strict=True))
    if scales_branches:
        run["scaled"] = overshoot.losses(trainer, overshoot.branches(method.dense(setting, seed)))
    return run


def compile_training(model: nn.Module) -> None:
    """Evaluation stays as it is: it would be compiled for every number of rows, and takes little time."""
    torch._dynamo.reset()  # another run's model has other shapes
    eager = model.forward
    compiled = torch.compile(eager, dynamic=False)

    @functools.wraps(eager)  # the Trainer looks at its arguments
    def forward(*args, **kwargs):
        return (compiled if model.training else eager)(*args, **kwargs)

    model.forward = forward


def train_on_text(
    method: Method, seed: int, setting: TextSetting, text_file: str | None, cache: str, *, compiles: bool = False
) -> dict:
    """``cache``: a folder in which the text is prepared, see :func:`hf_sdp.bench.corpus.prepared`."""
    data, _ = corpus.prepared(cache, setting.vocab_size, setting.sequence, text_file=text_file)
    valid = evaluated(data["valid"], setting.eval_sequences)

    def make_trainer(model: nn.Module, args: TrainingArguments) -> Trainer:
        return Trainer(
            model, args, train_dataset=data["train"], eval_dataset=valid, data_collator=default_data_collator
        )  # fmt: skip

    return train(method, seed, setting, make_trainer, scales_branches=True, compiles=compiles)


def schedule(name: str, steps: int) -> dict:
    """The ``TrainingArguments`` of a schedule: 5% warm-up, then cosine, or constant and linear over the last 20%."""
    if name == "cosine":
        return {"lr_scheduler_type": "cosine", "warmup_steps": steps // 20}
    decay = {"num_decay_steps": steps // 5, "decay_type": "linear"}
    return {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": steps // 20, "lr_scheduler_kwargs": decay}


def mean_numel(plan: Plan) -> float:
    """Parameters of a subnetwork, mean over them."""
    return sum(map(plan.numel, range(plan.num_subnetworks))) / plan.num_subnetworks


def evaluated(valid, num_sequences: int):
    """``num_sequences`` held-out sequences, or all where there are fewer, evenly from the whole."""
    every = max(1, len(valid) // num_sequences)
    return valid.select(range(0, len(valid), every)[:num_sequences])
