"""Metadata of torch.distributed.checkpoint, read without running anything.

It is a pickle, and a pickle can call whatever it names. Here it may name only the classes that torch writes there, and
only files of its folder.
Source: torch/distributed/checkpoint/filesystem.py (``FileSystemReader.read_metadata``).
"""

import pathlib
import pickle
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta

from ..errors import SDPStateError

FILE = ".metadata"
_KNOWN = {
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", _MEM_FORMAT_ENCODING.__name__,
    },
    "torch.serialization": {"_get_layout"},  # name -> torch.layout
    "torch": {"Size"},
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name.endswith("Path"):
            return pathlib.PurePath  # where it was written: never used
        if (module, name) == ("builtins", "getattr"):
            return _member
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint does")
        return super().find_class(module, name)


def _member(enumeration: Any, name: str) -> Any:
    """The one use of ``getattr``: Python 3.11.0 to 3.11.3 pickle the member of an enumeration so."""
    if enumeration is not _MEM_FORMAT_ENCODING or name not in _MEM_FORMAT_ENCODING.__members__:
        raise pickle.UnpicklingError(f"it asks for {name!r} of {enumeration!r}, which no checkpoint does")
    return _MEM_FORMAT_ENCODING[name]


def read_metadata(folder: Path) -> Metadata:
    """The metadata of what torch.distributed.checkpoint has written into ``folder``.

    Raises: SDPStateError that names the file, when it is missing or damaged, or names anything but what torch writes.
    """
    file = folder / FILE
    try:
        with open(file, "rb") as opened:
            metadata = _Unpickler(opened).load()
    except Exception as error:  # a damaged pickle raises anything
        raise SDPStateError(f"{file} cannot be read: {error}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise SDPStateError(f"{file} has no metadata of a checkpoint.")
    for info in metadata.storage_data.values():
        path = getattr(info, "relative_path", None)
        if not isinstance(path, str) or Path(path).name != path or path in ("", ".", ".."):
            raise SDPStateError(f"{file} names {path!r}, which is no file of the folder.")
        if info.transform_descriptors:
            raise SDPStateError(f"{file} asks for the transformations {info.transform_descriptors!r} of {path}.")
    return metadata


class Reader(dcp.FileSystemReader):
    """``FileSystemReader`` that runs nothing it reads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata
