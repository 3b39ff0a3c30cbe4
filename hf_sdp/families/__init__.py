"""The structure of a model: its layers, their residual blocks, and how each kind of block is cut.

It is found in a recording of the model on the meta device.
"""

from .base import Block, Structure
from .structure import structure_of

__all__ = ["Block", "Structure", "structure_of"]
