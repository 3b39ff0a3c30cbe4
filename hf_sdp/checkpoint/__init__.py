"""Checkpoint folders: what they contain, how they are written, read and checked."""

from .marker import check

__all__ = ["check"]
