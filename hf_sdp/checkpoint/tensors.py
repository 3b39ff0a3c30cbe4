"""Boxes of full tensors in torch.distributed.checkpoint: every worker writes what it owns and reads what it stores."""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from ..errors import SDPStateError
from ..plan.region import Box, Region
from ..world.agreement import raised_by_all
from .metadata import Reader, read_metadata


class Boxes:
    """This worker's boxes of one full tensor, as torch.distributed.checkpoint wants them. A DTensor could not say it:
    the boxes of one full tensor lie on several meshes. Source: torch/distributed/_checkpointable.py."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        self.shape, self.dtype = torch.Size(shape), dtype
        self.pieces: dict[tuple[int, ...], tuple[Box, torch.Tensor]] = {}

    def add(self, region: Region, tensor: torch.Tensor) -> None:
        """``tensor``, of the region's shape, has the region."""
        for box, view in region.views(tensor):
            self.pieces[tuple(start for start, _ in box)] = (box, view)

    def size(self) -> torch.Size:
        return self.shape

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [
            ChunkStorageMetadata(torch.Size(start for start, _ in box), torch.Size(b - a for a, b in box))
            for box, _ in self.pieces.values()
        ]

    def __create_write_items__(self, fqn: str, _) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> torch.Tensor:
        assert index.offset is not None  # every item that is written here has one
        return self.pieces[tuple(index.offset)][1]


class _SavePlanner(dcp.DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex):
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


class _LoadPlanner(dcp.DefaultLoadPlanner):
    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        # The base class would copy what it does not know.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex):
        return self.state_dict[index.fqn].__get_tensor_shard__(index)


def write(folder: Path, tensors: dict[str, Boxes], group: dist.ProcessGroup | None) -> None:
    """Collective over ``group``. Raises: SDPStateError on all workers when one of them cannot write."""
    with _errors_of_all():
        dcp.save(
            tensors,
            storage_writer=dcp.FileSystemWriter(folder),
            planner=_SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
        )


def read(folder: Path, tensors: dict[str, Boxes], group: dist.ProcessGroup | None) -> None:
    """Fill the boxes' tensors, reading the parts of ``folder`` that they need. Collective over ``group``.

    Raises: SDPStateError on all workers when one of them cannot read.
    """
    with _errors_of_all():
        dcp.load(
            tensors,
            storage_reader=Reader(folder),
            planner=_LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=group,
        )


@contextlib.contextmanager
def _errors_of_all() -> Iterator[None]:
    """CheckpointException is a BaseException, which `except Exception` does not see."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is fine
            yield
    except dcp.CheckpointException as error:
        failures = "; ".join(f"rank {rank}: {type(e).__name__}: {e}" for rank, (e, _) in error.failures.items())
        raise raised_by_all(SDPStateError(failures)) from error


def stored(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> full shape and dtype of everything in ``folder``."""
    metadata = read_metadata(folder).state_dict_metadata
    result = {}
    for name, entry in metadata.items():
        assert isinstance(entry, TensorStorageMetadata)  # nothing but tensors is written here
        result[name] = (tuple(entry.size), entry.properties.dtype)
    return result
