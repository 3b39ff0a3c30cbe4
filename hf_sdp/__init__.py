"""Subnetwork Data Parallelism (arXiv 2507.09029) for Hugging Face models.

Names are imported when they are first used, so that ``import hf_sdp`` and ``hf-sdp --help`` need neither torch nor
transformers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.export import export_subnetwork
    from .checkpoint.save import save_pretrained
    from .config import SDPConfig
    from .engine.consistency import verify
    from .engine.consolidate import consolidate
    from .engine.gradients import global_norm
    from .engine.sharded import weights_changed
    from .engine.statistics import recalibrate
    from .errors import SDPConfigError, SDPStateError
    from .families.registered import Family, register_family
    from .hosts.accelerator import SDPAccelerator
    from .hosts.adoption import disable, enable
    from .hosts.trainer import SDPCallback
    from .hosts.trainer_checkpoint import last_checkpoint
    from .model.forward import local_state_dict
    from .model.numbers import local_num_parameters
    from .patch import patch_model
    from .phases import follow_schedule
    from .plan.plan import Plan
    from .planner import make_plan, make_plans
    from .pretrained import from_config, from_pretrained
    from .workload import Workload

_HOMES = {
    "Family": "families.registered",
    "Plan": "plan.plan",
    "SDPAccelerator": "hosts.accelerator",
    "SDPCallback": "hosts.trainer",
    "SDPConfig": "config",
    "SDPConfigError": "errors",
    "SDPStateError": "errors",
    "Workload": "workload",
    "consolidate": "engine.consolidate",
    "disable": "hosts.adoption",
    "enable": "hosts.adoption",
    "export_subnetwork": "checkpoint.export",
    "follow_schedule": "phases",
    "from_config": "pretrained",
    "from_pretrained": "pretrained",
    "global_norm": "engine.gradients",
    "last_checkpoint": "hosts.trainer_checkpoint",
    "local_num_parameters": "model.numbers",
    "local_state_dict": "model.forward",
    "make_plan": "planner",
    "make_plans": "planner",
    "patch_model": "patch",
    "recalibrate": "engine.statistics",
    "register_family": "families.registered",
    "save_pretrained": "checkpoint.save",
    "verify": "engine.consistency",
    "weights_changed": "engine.sharded",
}
"""Public name -> the module that it is in."""

__all__ = [
    "Family",
    "Plan",
    "SDPAccelerator",
    "SDPCallback",
    "SDPConfig",
    "SDPConfigError",
    "SDPStateError",
    "Workload",
    "consolidate",
    "disable",
    "enable",
    "export_subnetwork",
    "follow_schedule",
    "from_config",
    "from_pretrained",
    "global_norm",
    "last_checkpoint",
    "local_num_parameters",
    "local_state_dict",
    "make_plan",
    "make_plans",
    "patch_model",
    "recalibrate",
    "register_family",
    "save_pretrained",
    "verify",
    "weights_changed",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
