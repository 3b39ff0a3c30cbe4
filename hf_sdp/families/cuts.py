"""How blocks are cut at neuron level."""

import contextlib
import re

from torch import nn

from .absent import ZEROS, Absent, Outputs
from .base import Block, CannotCut, Cut
from .kinds import EXPERTS, KINDS, MLP
from .layers import is_experts
from .recording import Recording
from .trial import Trial


def find_cuts(
    model: nn.Module, recording: Recording, layer: str, block: Block, others: dict[str, Absent]
) -> tuple[Cut, ...]:
    """How a block is cut: as one, or experts and what is beside them.

    Args:
        model: on the meta device, as it was recorded.
        layer: name of the block's layer.
        others: what stands in for the modules of the layer's other blocks, where they can be left out.
    Raises: CannotCut.
    """
    if KINDS[block.kind] is not EXPERTS:
        return (Trial(model, recording, layer, block, others).find(),)
    experts = [
        f"{member}.{name}" if name else member
        for member in block.modules
        for name, module in model.get_submodule(member).named_modules()
        if is_experts(module)
    ]
    if not experts:
        raise CannotCut(f"{block.main} has no experts in parameters of three dims")
    found = [_cut_of_experts(name, model.get_submodule(name)) for name in experts]
    others = others | {name: Absent(type(model.get_submodule(name)), Outputs((ZEROS,))) for name in experts}
    for member in block.modules:
        for name, _ in model.get_submodule(member).named_children():
            if re.search("shared", name):
                shared = f"{member}.{name}"
                with contextlib.suppress(CannotCut):  # then all hold them
                    beside = Block(MLP.name, block.layer, (shared,), shared)
                    found.append(Trial(model, recording, layer, beside, others).find())
    return tuple(found)


def _cut_of_experts(name: str, experts: nn.Module) -> Cut:
    dims = {f"{name}.{p}": 0 for p in experts._parameters if experts._parameters[p] is not None}
    number = vars(experts)["num_experts"]
    return Cut(EXPERTS.name, name, number, dims, {}, {name: ("num_experts",)})
