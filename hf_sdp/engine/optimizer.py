"""The optimizer under SDP: points at the sharded parameters, steps on plain local shards.

An optimizer made before sharding holds parameters that no longer are the model's; they are replaced in place, each
once, so that param groups, their order and a scheduler made before stay as the user made them. During ``step`` the
optimizer sees this worker's shards as plain tensors: one foreach or fused kernel then serves all meshes, where
DTensors of several meshes would need a param group each. Exact for optimizers that work element by element.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import SDPConfigError, SDPStateError
from ..model.state import local_tensor, unwrap
from ..world.agreement import together
from .same_optimizer import agree_on_groups
from .sharded import Sharded, find_sharded, get_sharded, refuse_parameters_of_before

ELEMENTWISE_OPTIMIZERS = {
    *(f"torch.optim.{name.lower()}.{name}" for name in (
        "Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD",
    )),
    "lion_pytorch.lion_pytorch.Lion",
}  # fmt: skip
"""Module and name of the classes whose update of an element depends on that element alone.

They make their state in the first step, but for Adagrad. A class is known exactly: a subclass, or another one of that
name, may compute anything. Add ``"your_module.YourOptimizer"``."""
_ATTRIBUTE = "_sdp_repointed"


@dataclass
class _Repointed:
    """Kept on an optimizer that trains a sharded model.

    Attributes:
        model: the sharded one.
        replaced: within :func:`local_shards` and a step, of each param group its parameters, and the shards that took
            their place; else empty.
    """

    model: nn.Module
    replaced: list[tuple[list[nn.Parameter], list[nn.Parameter]]] = field(default_factory=list)


def _repointed(optimizer: torch.optim.Optimizer) -> _Repointed:
    return vars(optimizer)[_ATTRIBUTE]


def model_of(optimizer: torch.optim.Optimizer) -> nn.Module | None:
    """The sharded model that ``optimizer`` was re-pointed to; None for any other optimizer."""
    return _repointed(optimizer).model if _ATTRIBUTE in vars(optimizer) else None


def inner_optimizer(optimizer: Any) -> Any:
    """The optimizer that Accelerate, or another host, has wrapped; one that is not wrapped as it is."""
    return getattr(optimizer, "optimizer", optimizer)


def refuse_unless_elementwise(optimizer: torch.optim.Optimizer) -> None:
    """Raises SDPConfigError for an optimizer whose class is not known to be element-wise.

    On slices and shards of a matrix, factored or orthogonalized updates (Adafactor, Muon, Shampoo, LAMB, ...) are
    silently different ones.
    """
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if name not in ELEMENTWISE_OPTIMIZERS:
        raise SDPConfigError(
            f"{type(optimizer).__name__} is not known to update every element on its own; on slices of a parameter it "
            f"would silently compute something else. Use one of {sorted(ELEMENTWISE_OPTIMIZERS)}. If yours is "
            f"element-wise, add {name!r} to hf_sdp.engine.optimizer.ELEMENTWISE_OPTIMIZERS."
        )


def repoint(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Let ``optimizer`` train the parameters of the sharded ``model``: by identity, each exactly once.

    Collective over the world of the model.

    Raises: on every worker, and nothing is changed then: SDPConfigError for an optimizer that is not element-wise, has
        parameters of something else, or other ones in a group than on other workers; SDPStateError when it already has
        state, which belongs to the old tensors.
    """
    model = unwrap(model)
    if model_of(optimizer) is model:
        return
    sharded = get_sharded(model, "repoint")
    with together(sharded.control_group):
        refuse_unless_elementwise(optimizer)
        groups = _new_groups(optimizer, sharded)
    agree_on_groups(groups, sharded)
    name_of = {id(p): name for name, p in sharded.parameters.items()}
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        _fill(group, {name_of[id(p)]: p for p in parameters})
    if _is_new_adagrad(optimizer):
        _make_adagrads_state(optimizer)
    setattr(optimizer, _ATTRIBUTE, _Repointed(model))
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: _enter(opt))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: _leave(opt, stepped=True))


def owner_of(optimizer: torch.optim.Optimizer, models: Sequence[nn.Module]) -> nn.Module:
    """Of sharded models the one that has, or had, a parameter of the optimizer; the last one where none has."""
    given = [p for group in optimizer.param_groups for p in group["params"]]
    for model in models:
        sharded = get_sharded(model, "repoint")
        ours = {id(p) for p in sharded.parameters.values()}
        if any(id(p) in ours or p in sharded.run.replaced for p in given):
            return model
    return models[-1]


def train_from_now_on(
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Mapping[str, nn.Parameter]],
    state: Mapping[nn.Parameter, dict[str, Any]],
) -> None:
    """Give an optimizer other parameters, by their names, and their state. Its groups keep their options, and stay the
    objects that a scheduler has."""
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        _fill(group, parameters)
    optimizer.state.clear()
    for parameter, of_parameter in state.items():
        optimizer.state[parameter] = of_parameter


def _fill(group: dict[str, Any], parameters: Mapping[str, nn.Parameter]) -> None:
    """``parameters``: by their names, which the group has if it was made from ``model.named_parameters()``."""
    group["params"] = list(parameters.values())
    if "param_names" in group:
        group["param_names"] = list(parameters)


def _new_groups(optimizer: torch.optim.Optimizer, sharded: Sharded) -> list[list[nn.Parameter]]:
    """The parameters that each group trains from now on."""
    current, replaced = sharded.parameters, sharded.run.replaced
    ours = {id(p) for p in current.values()}
    groups = []
    seen: set[int] = set()
    for group in optimizer.param_groups:
        parameters = []
        for p in group["params"]:
            if id(p) in ours:
                new = [p]
            elif p in replaced:
                new = [current[name] for name in replaced[p]]
            else:
                raise SDPConfigError(
                    f"The optimizer has a parameter of shape {tuple(p.shape)} that is not one of the model's, neither "
                    "now nor before it was patched. Make the optimizer from model.parameters()."
                )
            # A full parameter kept in two parts appears in both; a shared one of many parts must not come twice.
            parameters += [q for q in new if id(q) not in seen]
            seen.update(id(q) for q in new)
        groups.append(parameters)
    if not _is_new_adagrad(optimizer) and any(id(p) not in ours for p in optimizer.state):
        raise SDPStateError(
            "The optimizer already has state for parameters that sharding replaced; it would be lost. Prepare model "
            "and optimizer before the first step."
        )
    return groups


def _is_new_adagrad(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer) is torch.optim.Adagrad and not any(s["step"] for s in optimizer.state.values())


def _make_adagrads_state(optimizer: torch.optim.Optimizer) -> None:
    """Adagrad makes its state when it is made, for tensors that sharding replaces. Source: torch/optim/adagrad.py."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for p in group["params"]:
            total = torch.full_like(local_tensor(p.detach()), group["initial_accumulator_value"])
            optimizer.state[p] = {"step": torch.tensor(0.0), "sum": total}


@contextlib.contextmanager
def local_shards(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Within, ``optimizer.param_groups`` are plain local shards with local gradients. No effect on others."""
    if find_sharded(model_of(optimizer)) is None:
        yield
        return
    _enter(optimizer)
    try:
        yield
    finally:
        _leave(optimizer, stepped=False)


@torch.no_grad()  # with gradients, every local shard would be made through autograd: 3 ms a step in a small model
def _enter(optimizer: torch.optim.Optimizer) -> None:
    _leave(optimizer, stepped=False)  # a step that raised left its shards in place
    repointed = _repointed(optimizer)
    sharded = get_sharded(repointed.model, "An optimizer's step")
    refuse_parameters_of_before((p for group in optimizer.param_groups for p in group["params"]), [sharded])
    for group in optimizer.param_groups:
        shards = []
        for p in group["params"]:
            shard = nn.Parameter(local_tensor(p).detach(), requires_grad=p.requires_grad)
            if p.grad is not None:
                shard.grad = local_tensor(p.grad)
            if p in optimizer.state:
                optimizer.state[shard] = optimizer.state.pop(p)
            shards.append(shard)
        repointed.replaced.append((group["params"], shards))
        group["params"] = shards


def _leave(optimizer: torch.optim.Optimizer, *, stepped: bool) -> None:
    repointed = _repointed(optimizer)
    for group, (parameters, shards) in zip(optimizer.param_groups, repointed.replaced, strict=False):
        for p, shard in zip(parameters, shards, strict=True):
            if shard in optimizer.state:
                optimizer.state[p] = optimizer.state.pop(shard)
        group["params"] = parameters
    repointed.replaced = []
    if stepped:
        sharded = get_sharded(repointed.model, "An optimizer's step")
        sharded.stepped.add(optimizer)
        sharded.weights_changed()
