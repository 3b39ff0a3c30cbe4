"""LoRA adapters of the command line."""

import click
from torch import nn

from .errors import CommandError
from .models import first_line
from .options import add_options

lora_options = add_options(
    click.option("--lora-r", type=click.IntRange(min=1), help="LoRA adapters (PEFT) of this rank; all else is frozen."),
    click.option("--lora-targets", help="Layers that have them: q_proj,v_proj. By default all linear ones."),
)
"""See :func:`with_lora`."""


def with_lora(model: nn.Module, lora_r: int | None, lora_targets: str | None) -> nn.Module:
    """The model with the adapters that are asked for, in place, as PEFT makes them.

    Raises: CommandError when PEFT is not there, or has no such layers.
    """
    if lora_r is None:
        if lora_targets is not None:
            raise click.UsageError("--lora-targets needs --lora-r.")
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise CommandError("--lora-r needs peft: pip install peft") from error
    try:
        targets = "all-linear" if lora_targets is None else lora_targets.split(",")
        return get_peft_model(model, LoraConfig(r=lora_r, target_modules=targets))
    except ValueError as error:
        raise CommandError(f"PEFT makes no adapters for --lora-targets {lora_targets}: {first_line(error)}") from error
