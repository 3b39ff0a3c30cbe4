"""Checkpoint folders: what they contain, how they are written, read and checked."""
