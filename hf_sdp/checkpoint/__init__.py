"""Checkpoint folders: what they contain, how they are written, read and checked."""

from .folder import check

__all__ = ["check"]
