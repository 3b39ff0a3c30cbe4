"""Sharded training over the holder meshes. Nearly everything here is collective."""
