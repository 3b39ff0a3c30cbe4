"""The structure of a model: its layers, their residual blocks, and how each kind of block is cut.

It is found in a recording of the model on the meta device.
"""

from .base import Block, Structure
from .structure import cuts_of, structure_of

__all__ = ["Block", "Structure", "cuts_of", "structure_of"]
