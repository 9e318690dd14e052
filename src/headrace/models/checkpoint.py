"""A folder of safetensors, read through memory maps without ever holding a file in memory.

Nothing in a checkpoint is executed: only config.json and safetensors are read, never pickles or code.
"""

import json
import mmap
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.models.json_file import read_json

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
"""Python names it from 3.13 on; the number is that of x86-64 and ARM."""


HOST_BLOCK_BYTES = 2**19
"""Of a block of rows: quantizing one needs temporaries of ten times its size, which must stay small beside a model."""

DEVICE_BLOCK_BYTES = 2**24
"""Of one that goes to a GPU, where what it costs to start a copy counts."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies; start_byte counts from the beginning of the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start_byte: int

    @property
    def row_bytes(self) -> int:
        row = 1
        for size in self.shape[1:]:
            row *= size
        return row * self.dtype.itemsize

    @property
    def num_bytes(self) -> int:
        return self.row_bytes * (self.shape[0] if self.shape else 1)


class Checkpoint:
    """The tensors of a folder, by name.

    Owns one memory map per file. Pages a reader is done with are given back with `release`, so that loading a model
    keeps its own weights in memory and little else.

    Raises:
        CheckpointError: no safetensors, a truncated or corrupt file, an index that names a missing file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, TensorInfo] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        for file in _safetensors_files(folder):
            self._add_file(file)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor, a view of the file: copy what you keep, then call `release`."""
        info = self.tensors[name]
        shape = (stop - start, *info.shape[1:])
        count = (stop - start) * info.row_bytes // info.dtype.itemsize
        if count == 0:
            return torch.empty(shape, dtype=info.dtype)
        offset = info.start_byte + start * info.row_bytes
        return torch.frombuffer(self._maps[info.file], dtype=info.dtype, count=count, offset=offset).view(shape)

    def row_blocks(self, name: str, rows: range, block_bytes: int = HOST_BLOCK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """Blocks of rows as (first row, view); by default small enough that work on them stays in the CPU's cache.

        A block's pages are given back when the next one is asked for.
        """
        step = max(1, block_bytes // max(1, self.tensors[name].row_bytes))
        for start in range(rows.start, rows.stop, step):
            yield start, self.read_rows(name, start, min(start + step, rows.stop))
            self.release(name)

    def read_whole(self, name: str) -> Tensor:
        """A tensor of any number of dimensions, scalars included; a view like `read_rows`."""
        shape = self.tensors[name].shape
        return self.read_rows(name, 0, shape[0]) if shape else self._read_scalar(name)

    def release(self, name: str) -> None:
        """Drop a tensor's pages from this process's memory; they are read again from disk if needed."""
        info = self.tensors[name]
        start = info.start_byte // mmap.PAGESIZE * mmap.PAGESIZE
        self._maps[info.file].madvise(mmap.MADV_DONTNEED, start, info.start_byte + info.num_bytes - start)

    def _read_scalar(self, name: str) -> Tensor:
        info = self.tensors[name]
        return torch.frombuffer(self._maps[info.file], dtype=info.dtype, count=1, offset=info.start_byte).view(())

    def _add_file(self, file: Path) -> None:
        _check_safetensors(file)
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(header_bytes))
            self._maps[file] = _map(stream.fileno(), file)
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in self.tensors:
                raise CheckpointError(f"tensor '{name}' is in both {self.tensors[name].file.name} and {file.name}")
            self.tensors[name] = _tensor_info(name, entry, file, 8 + header_bytes)


def _safetensors_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return _unindexed_files(folder)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to files")
    # An index is data from elsewhere: it may name files of its own folder and nothing else.
    files = [folder / Path(name).name for name in sorted(set(weight_map.values()))]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise CheckpointError(f"{index.name} names files that {folder} does not have: {', '.join(missing[:5])}")
    return files


def _unindexed_files(folder: Path) -> list[Path]:
    single = folder / "model.safetensors"
    files = [single] if single.exists() else sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    hint = f"; {pickles[0]} is a pickle, which can run code and is never read: convert it" if pickles else ""
    raise CheckpointError(f"{folder} has no safetensors files{hint}")


def _check_safetensors(file: Path) -> None:
    """Let the library validate header, offsets and length."""
    try:
        with safe_open(str(file), framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size if file.exists() else 0
        raise CheckpointError(f"{file} ({size} bytes) is not a whole safetensors file: {error}") from None


def _map(descriptor: int, file: Path) -> mmap.mmap:
    """A private map that may be written satisfies torch's wish for writable buffers; nothing ever writes, so the system
    need not set memory aside for copies, which it would refuse for a file larger than its memory."""
    try:
        return mmap.mmap(descriptor, 0, mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be mapped into memory: {error}") from None


def _tensor_info(name: str, entry: dict[str, Any], file: Path, data_start: int) -> TensorInfo:
    if entry["dtype"] not in _DTYPES:
        raise CheckpointError(f"tensor '{name}' in {file.name} has dtype {entry['dtype']}; known: {', '.join(_DTYPES)}")
    dtype, start_byte = _DTYPES[entry["dtype"]], data_start + entry["data_offsets"][0]
    return TensorInfo(file=file, dtype=dtype, shape=tuple(entry["shape"]), start_byte=start_byte)
