"""The weights of a standard Hugging Face folder: read by ranges, written tensor by tensor.

``safetensors`` writes a file from tensors that are all in memory; a full model need not fit there, so the file is
written here, in the order of its tensors. Format: 8 bytes length of the header (little endian), the header as JSON
(name -> dtype, shape, range of bytes), the tensors' bytes. Source: huggingface/safetensors, README, "Format".
"""

import json
import os
import re
import struct
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open

from ..errors import SDPConfigError, SDPStateError
from ..plan.region import Region
from .files import read_json, reading, size_of
from .marker import is_inside

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class Weights:
    """Tensors of a folder's ``model.safetensors``, or of its shards and their index; read by range.

    Args:
        file_names: tensor -> name of its file, of a worker that has looked (its ``file_names``); default: look.
    Raises: SDPConfigError that names the file: none there, no permission, cut short, or missing from the index.
    """

    def __init__(self, folder: str | os.PathLike, file_names: dict[str, str] | None = None):
        self.folder = Path(folder)
        self._headers: dict[Path, dict[str, tuple[tuple[int, ...], str]]] = {}
        self.file_names = self._look() if file_names is None else file_names
        self.files = {name: self.folder / file for name, file in self.file_names.items()}

    def _look(self) -> dict[str, str]:
        if size_of(self.folder / INDEX) is not None:
            return _weight_map(self.folder / INDEX)
        if size_of(self.folder / SINGLE) is not None:
            return dict.fromkeys(self._header(self.folder / SINGLE), SINGLE)
        raise SDPConfigError(f"{self.folder} has neither {SINGLE} nor {INDEX}.")

    def _header(self, file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
        """Name -> shape and dtype of the tensors of one file."""
        if file not in self._headers:
            try:
                with reading(file):
                    open(file, "rb").close()  # safetensors says "no such file" without permission as well
                with safe_open(file, "pt") as opened:
                    slices = {name: opened.get_slice(name) for name in opened.keys()}
                    self._headers[file] = {n: (tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
            except (SafetensorError, SDPStateError, OSError) as error:
                raise SDPConfigError(f"{file} is missing, cut short or not a safetensors file: {error}") from error
        return self._headers[file]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None when there is no such tensor."""
        header = self._header(self.files[name]) if name in self.files else {}
        return header[name][0] if name in header else None

    def dtype(self, name: str) -> torch.dtype:
        """Raises: SDPConfigError that names the file for a dtype that hf_sdp does not write."""
        stored = self._header(self.files[name])[name][1]
        for dtype, known in _DTYPES.items():
            if known == stored:
                return dtype
        raise SDPConfigError(f"{self.files[name]}: {name} is of dtype {stored}, hf_sdp knows {[*_DTYPES.values()]}.")

    def check(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raises SDPConfigError that names the file, unless every one of ``shapes`` is there with this shape."""
        for name, shape in shapes.items():
            found = self.shape(name)
            if found != tuple(shape):
                what = "is missing" if found is None else f"has shape {found}"
                raise SDPConfigError(
                    f"{self.files.get(name, self.folder)}: {name} {what}, the model needs {tuple(shape)}. "
                    "These are the weights of another model."
                )

    def read(self, region: Region, into: torch.Tensor) -> None:
        """Fill ``into``, of the region's shape, with the region of a tensor; only that is read.

        The file is mapped for this call only: pages that have been read would count as this process's memory for as
        long as it is open.
        """
        with safe_open(self.files[region.name], "pt") as opened:
            stored = opened.get_slice(region.name)
            for box, view in region.views(into):
                view.copy_(stored[tuple(slice(start, stop) for start, stop in box)])


class RenamedWeights:
    """Tensors of folders by other names. ``places``: name -> the weights of its folder, and its name there."""

    def __init__(self, places: dict[str, tuple[Weights, str]]):
        self.places = places

    def shape(self, name: str) -> tuple[int, ...] | None:
        """None when there is no such tensor."""
        if name not in self.places:
            return None
        weights, key = self.places[name]
        return weights.shape(key)

    def read(self, region: Region, into: torch.Tensor) -> None:
        """Fill ``into``, of the region's shape, with the region of a tensor."""
        weights, key = self.places[region.name]
        weights.read(Region(key, region.ranges), into)


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file. Raises: SDPConfigError that names the index when it is damaged or names files elsewhere."""
    try:
        content = read_json(index)
    except SDPStateError as error:
        raise SDPConfigError(str(error)) from error
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise SDPConfigError(f"{index} cannot be read: it has no 'weight_map' of tensors to files.")
    for file in weight_map.values():
        if not isinstance(file, str) or not is_inside(file):
            raise SDPConfigError(f"{index} names {file!r}, which is no file of the folder.")
    return weight_map


class WeightsWriter:
    """Writes a folder's weights tensor by tensor; what is there stays valid until :meth:`finish`. OSError leaves
    nothing behind.

    Args:
        specs: name -> ``(shape, dtype)`` of everything that :meth:`write` will get, in whatever order.
        max_shard_size: as in ``save_pretrained``, e.g. "5GB": above it, several files and an index.
    """

    def __init__(self, folder: str | os.PathLike, specs: dict[str, tuple], max_shard_size: int | str = "50GB"):
        self.folder, self.specs = Path(folder), specs
        meta = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in specs.items()}
        self.split = split_torch_state_dict_into_shards(
            meta, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
        )
        self._files: dict[str, BinaryIO] = {}
        self._offsets: dict[str, int] = {}

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """``tensor``: on the CPU, of the shape and dtype announced."""
        file_name = self.split.tensor_to_filename[name]
        try:
            if file_name not in self._files:
                self._begin(file_name)
            self._files[file_name].seek(self._offsets[name])
            self._files[file_name].write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except OSError:
            self._discard()
            raise

    def finish(self) -> None:
        """Put the files in place of what was there."""
        try:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
                file.close()
        except OSError:
            self._discard()
            raise
        for name in self.split.filename_to_tensors:
            os.replace(self._unfinished(name), self.folder / name)
        if self.split.is_sharded:
            index = {"metadata": self.split.metadata, "weight_map": self.split.tensor_to_filename}
            unfinished = self._unfinished(INDEX)
            unfinished.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
            os.replace(unfinished, self.folder / INDEX)
        else:
            (self.folder / INDEX).unlink(missing_ok=True)
        for old in self.folder.iterdir():  # files of an earlier save that no index names any more
            if re.fullmatch(r"model(-\d{5}-of-\d{5})?\.safetensors", old.name):
                if old.name not in self.split.filename_to_tensors:
                    old.unlink()

    def _discard(self) -> None:
        for name in self.split.filename_to_tensors:
            self._unfinished(name).unlink(missing_ok=True)

    def _unfinished(self, file_name: str) -> Path:
        return self.folder / f".{file_name}.unfinished"

    def _begin(self, file_name: str) -> None:
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name in self.split.filename_to_tensors[file_name]:
            shape, dtype = self.specs[name]
            size = torch.Size(shape).numel() * dtype.itemsize
            header[name] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # tensors start aligned
        self._files[file_name] = open(self._unfinished(file_name), "wb")
        self._files[file_name].write(struct.pack("<Q", len(encoded)) + encoded)
        for name in self.split.filename_to_tensors[file_name]:
            self._offsets[name] = 8 + len(encoded) + header[name]["data_offsets"][0]
