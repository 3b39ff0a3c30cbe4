"""How good the full model gets: SDP, data parallel and the usual baselines, trained in one process each."""

from .methods import FAMILIES, Method
from .names import parse_methods, sorted_runs
from .results import Results, train_missing
from .setting import Setting, TextSetting
from .training import number_of_steps, step_flops, train, train_on_text

__all__ = [
    "FAMILIES",
    "Method",
    "Results",
    "Setting",
    "TextSetting",
    "step_flops",
    "number_of_steps",
    "parse_methods",
    "sorted_runs",
    "train",
    "train_missing",
    "train_on_text",
]
