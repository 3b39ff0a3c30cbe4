"""Subnetwork Data Parallelism (arXiv 2507.09029) for Hugging Face models."""

from .accelerator import SDPAccelerator
from .canonical import consolidate
from .config import SDPConfig
from .errors import SDPConfigError, SDPStateError
from .export import export_subnetwork
from .loading import from_config, from_pretrained
from .patch import patch_model
from .plan import Plan
from .planner import make_plan
from .saving import save_pretrained
from .trainer import SDPCallback, enable
from .verify import verify
from .workload import Workload

__all__ = [
    "Plan",
    "SDPAccelerator",
    "SDPCallback",
    "SDPConfig",
    "SDPConfigError",
    "SDPStateError",
    "Workload",
    "consolidate",
    "enable",
    "export_subnetwork",
    "from_config",
    "from_pretrained",
    "make_plan",
    "patch_model",
    "save_pretrained",
    "verify",
]
__version__ = "0.1.0"
