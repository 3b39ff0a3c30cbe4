"""Experts of which a worker holds some.

The router is shared, and chooses among all. A token that it sends to an expert that is not held gets nothing from it,
as from an expert whose weights are zero: compute falls with what is held, and the weight of a held expert is what it is
in the full model. A router that chose among the held ones would make every worker compute k experts for every token.
Measured, that learns more in a step and less for its FLOPs (examples/benchmarks/routing.py). Losses that balance the
load are left to the model: it computes them from the router's logits of all experts.

Experts that are not held take the place that transformers gives to those of other devices under expert parallelism, the
number after the last one. Source: transformers/integrations/moe.py.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .layers import TensorsOfPart


class HeldExperts(nn.Module):
    """Mixed into the class of a module of experts.

    Attributes:
        sdp_held: numbers of the experts that are held, in the order of the rows of the parameters; of each part.
        sdp_num_experts: all.
        parts: ``TensorsOfPart`` each, if there are several; their outputs are added.
    """

    sdp_held: Sequence[Sequence[int]]
    sdp_num_experts: int
    num_experts: int
    parts: nn.ModuleList

    def forward(self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor):
        if self.num_experts == self.sdp_num_experts:  # the full module
            return super().forward(hidden_states, top_k_index, top_k_weights)
        own, parameters = vars(self), self._parameters
        before = own["num_experts"], own["_is_expert_parallel"], dict(parameters)
        total = None
        try:
            own["_is_expert_parallel"] = True
            for number, held in enumerate(self.sdp_held):
                if "parts" in self._modules:
                    part = self.parts[number]
                    assert isinstance(part, TensorsOfPart)
                    parameters.update({name: part(name) for name, _ in part.named_parameters()})
                own["num_experts"] = len(held)
                output = self._of_held(held, hidden_states, top_k_index, top_k_weights)
                total = output if total is None else total + output
        finally:
            own["num_experts"], own["_is_expert_parallel"] = before[:2]
            parameters.update(before[2])
        return total

    def _of_held(self, held: Sequence[int], hidden_states, top_k_index, top_k_weights):
        index, weights = routed(held, self.sdp_num_experts, top_k_index, top_k_weights)
        output = super().forward(hidden_states, index, weights)
        return output if output.requires_grad else output + 0.0 * hidden_states  # nothing is routed to what is held


def routed(
    held: Sequence[int], num_experts: int, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers among the held experts, and weights, of shape ``(tokens, k)``: those of others are the number after the
    last one, and zero."""
    place = torch.full((num_experts,), len(held), dtype=top_k_index.dtype, device=top_k_index.device)
    place[torch.tensor(held, device=place.device)] = torch.arange(len(held), dtype=place.dtype, device=place.device)
    index = place[top_k_index]
    return index, top_k_weights.masked_fill(index == len(held), 0)
