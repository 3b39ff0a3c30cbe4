"""The plan and the estimate of a model that a script has made: what ``hf_sdp.run --dry-run`` prints."""

from typing import Any

from rich.console import Console
from torch import nn

from ..config import SDPConfig
from ..errors import SDPConfigError
from ..estimate.figures import plan_figures
from ..estimate.side_by_side import other_rows, rows_of_phases
from ..families.adapters import without_peft
from ..planner import make_plans, num_subnetworks_of
from ..workload import DTYPES, Workload
from .estimate_command import print_rows
from .models import running
from .plan_command import print_figures
from .tables import console

_SEQUENCE = 512


def workload_of(model: nn.Module, arguments: Any, sequence: int | None) -> Workload:
    """Of a model, and of the ``TrainingArguments`` of its Trainer, if there is one.

    ``sequence``: by default 512 tokens, or as many as the model has positions.
    """
    base = without_peft(model)
    positions = getattr(base.config, "max_position_embeddings", _SEQUENCE)
    stored = str(next(p for p in base.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
    computes = "bfloat16" if getattr(arguments, "bf16", False) else stored
    computes = "float16" if getattr(arguments, "fp16", False) else computes
    return Workload(
        batch=getattr(arguments, "per_device_train_batch_size", 1),
        sequence=sequence or min(_SEQUENCE, positions),
        dtype=computes,  # type: ignore[arg-type]
        param_dtype=stored,  # type: ignore[arg-type]
        gradient_checkpointing=bool(getattr(arguments, "gradient_checkpointing", False)),
    )


def show(model: nn.Module, config: SDPConfig, workers: int, arguments: Any, sequence: int | None) -> None:
    """Print tables; nothing is changed.

    Raises: SDPConfigError as ``make_plan``, and for one worker; CommandError when a step cannot be computed.
    """
    if workers < 2 and not config.simulate:
        raise SDPConfigError(
            f"SDP needs at least 2 workers, the world has {workers}. Launch the dry run as the training, with one of "
            "configs/accelerate/*.yaml or torchrun; hf-sdp plan needs no processes."
        )
    base, out = without_peft(model), console()
    phases, name = make_plans(model, config, num_subnetworks_of(config, workers)), type(base).__name__
    workload = workload_of(model, arguments, sequence)
    with running(name):
        rows = other_rows(model, workload, workers) + rows_of_phases(model, phases, workload, workers)
    for planned in phases:
        figures = plan_figures(
            planned.plan, base, planned.config, num_workers=workers, sequence=workload.sequence,
            element_bytes=DTYPES[workload.dtype],
        )  # fmt: skip
        start = f", from {planned.phase.start:g} of the training on" if len(phases) > 1 else ""
        print_figures(out, name + start, planned.config, figures)
    learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print_rows(Console(width=max(out.width, 165)), name, workers, workload, phases, learned, rows)
