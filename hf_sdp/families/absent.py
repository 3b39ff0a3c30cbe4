"""What takes the place of a block that a worker does not hold. No parameters, and names of the host's arguments."""

import torch
from torch import nn


class SkippedAttention(nn.Module):
    """An attention block that is not held. It adds nothing to the residual stream, and caches nothing."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        return hidden_states.new_zeros(()), None


class SkippedMLP(nn.Module):
    """An MLP block that is not held. It adds nothing to the residual stream."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        return hidden_states.new_zeros(())


class SkippedLayer(nn.Module):
    """A layer that is not held. The residual stream passes through."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        return hidden_states
