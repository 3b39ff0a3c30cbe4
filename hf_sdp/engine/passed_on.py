"""Arguments that a module passes on: T5's attention returns the position biases that it was given, to the next layer.

FSDP2 gathers a group for backward when the gradient of one of its outputs is there, whichever comes first. That of a
tensor which all layers read comes last. Long reduced by then, the group would be gathered again, and reduced once more.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..compat import tree_flatten, tree_unflatten
from ..families.absent import Outputs
from ..plan.groups import Group


def pass_on_views(model: nn.Module, groups: Iterable[Group], absent: Mapping[str, Outputs]) -> None:
    """Let modules that pass on arguments get views of them, whose gradients come in the order of the layers.

    The first module of a group has them already: FSDP2 makes them.
    Args:
        absent: as in ``Structure``; it says what is passed on.
    """
    for group in groups:
        for name in group.modules[1:]:
            if name in absent and absent[name].passed_on:
                model.get_submodule(name).register_forward_pre_hook(_with_views, with_kwargs=True)


def _with_views(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    leaves, spec = tree_flatten((args, kwargs))
    return tree_unflatten([_view(leaf) for leaf in leaves], spec)


def _view(leaf: Any) -> Any:
    return leaf.view_as(leaf) if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf
