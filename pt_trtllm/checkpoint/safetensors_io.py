"""The safetensors format, streamed: read ranges without mapping whole files, write tensors larger than memory.

The `safetensors` library loads and saves whole tensors; converting checkpoints larger than memory needs neither.
Files written here are plain safetensors: every tool reads them.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TypeGuard

import torch

from pt_trtllm.config import shown
from pt_trtllm.errors import CheckpointError

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float64: "F64",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
MAX_HEADER_BYTES = 100_000_000
MAX_OFFSET = (1 << 63) - 1
MAX_DIMENSIONS = 64
"""torch has no more."""
DATA_ALIGNMENT = 4096
"""The first tensor starts on a page, so that memory-mapped weights are aligned."""


@dataclass(frozen=True)
class TensorInfo:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset in the file, in bytes."""

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Names, types, shapes and places of a file's tensors, checked against its size; and its metadata."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path}: not a safetensors file, or cut short: {size} bytes, header of {length}")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not JSON") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(
            f"{path}: not a safetensors file: __metadata__ is {shown(metadata)}, expected texts by name"
        )
    tensors = {}
    for name, entry in header.items():
        info = _parse_entry(path, name, entry, data_start=8 + length)
        if info.start + info.num_bytes > size:
            raise CheckpointError(
                f"{path}: cut short: {name} needs bytes up to {info.start + info.num_bytes}, the file has {size}; "
                "copy the file again"
            )
        tensors[name] = info
    return tensors, metadata


def _parse_entry(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    fields = [entry.get(key) for key in ("dtype", "shape", "data_offsets")] if isinstance(entry, dict) else [None] * 3
    dtype_name, shape, offsets = fields
    if not (isinstance(dtype_name, str) and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise CheckpointError(f"{path}: malformed safetensors entry for {shown(name)}: {shown(entry)}")
    if len(shape) > MAX_DIMENSIONS:  # multiplying millions of large numbers would take hours
        raise CheckpointError(f"{path}: {shown(name)} has {len(shape)} dimensions, expected at most {MAX_DIMENSIONS}")
    shape, (begin, end) = tuple(shape), offsets
    if dtype_name not in DTYPES:
        raise CheckpointError(f"{path}: {name} has type {dtype_name}, expected one of {sorted(DTYPES)}")
    info = TensorInfo(name, DTYPES[dtype_name], shape, data_start + begin)
    if end - begin != info.num_bytes:
        raise CheckpointError(f"{path}: {name} of shape {list(shape)} {dtype_name} cannot span bytes {begin} to {end}")
    return info


def _are_sizes(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_OFFSET for value in values
    )


class SafetensorsReader:
    """Reads ranges of tensors with plain file reads; nothing is mapped, so nothing stays resident."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors, self.metadata = read_header(path)
        self._file = path.open("rb", buffering=0)

    def read_rows(self, name: str, first: int, count: int, leading: tuple[int, ...] = ()) -> torch.Tensor:
        """Rows [first, first + count) of a tensor's axis 0, or of the sub-tensor at `leading` indices."""
        info = self.tensors[name]
        shape, offset = info.shape, 0
        for index in leading:
            shape = shape[1:]
            offset += index * math.prod(shape)
        row = math.prod(shape[1:])
        values = torch.empty((count, *shape[1:]), dtype=info.dtype)
        self._read_into(values, info.start + (offset + first * row) * info.dtype.itemsize)
        return values

    def read(self, name: str, leading: tuple[int, ...] = ()) -> torch.Tensor:
        shape = self.tensors[name].shape[len(leading) :]
        return self.read_rows(name, 0, shape[0], leading) if shape else self.read_rows(name, 0, 1).reshape(())

    def _read_into(self, values: torch.Tensor, offset: int) -> None:
        view = as_bytes(values)
        done = 0
        while done < len(view):
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path}: ends at byte {offset + done}; it was cut short while being read")
            done += count

    def close(self) -> None:
        self._file.close()


@dataclass(frozen=True)
class DeclaredTensor:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsWriter:
    """Writes declared tensors piece by piece, in any order; closing checks that every byte was written."""

    def __init__(self, path: Path, declared: Iterable[DeclaredTensor], metadata: dict[str, str] | None = None) -> None:
        self.path = path
        # Tensors of whole cache lines first: they keep every following one aligned.
        ordered = sorted(declared, key=lambda tensor: (tensor.num_bytes % 64 != 0, -tensor.dtype.itemsize))
        self.declared = {tensor.name: tensor for tensor in ordered}
        header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
        position, self._starts = 0, {}
        for tensor in ordered:
            end = position + tensor.num_bytes
            header[tensor.name] = {
                "dtype": DTYPE_NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            self._starts[tensor.name] = position
            position = end
        encoded = json.dumps(header, separators=(",", ":")).encode()
        padded = -(-(len(encoded) + 8) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
        self._data_start = 8 + padded
        self._missing = {tensor.name: tensor.num_bytes for tensor in ordered}
        self._file = path.open("wb", buffering=0)
        # Reserves the space, so that a full disk is found before hours of work.
        if position:
            os.posix_fallocate(self._file.fileno(), 0, self._data_start + position)
        self._pwrite(memoryview(padded.to_bytes(8, "little") + encoded.ljust(padded)), 0)

    def write(self, name: str, values: torch.Tensor, element_offset: int = 0) -> None:
        """Writes consecutive elements of a tensor, starting at `element_offset`."""
        tensor = self.declared[name]
        assert values.dtype == tensor.dtype, f"{name}: declared {tensor.dtype}, given {values.dtype}"
        data = as_bytes(values)
        start = element_offset * tensor.dtype.itemsize
        assert start + len(data) <= tensor.num_bytes, f"{name}: write past its end"
        self._pwrite(data, self._data_start + self._starts[name] + start)
        self._missing[name] -= len(data)

    def _pwrite(self, data: memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._file.fileno(), data[done:], offset + done)

    def close(self) -> None:
        incomplete = [name for name, missing in self._missing.items() if missing]
        assert not incomplete, f"{self.path}: not completely written: {incomplete[:5]}"
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def as_bytes(values: torch.Tensor) -> memoryview:
    """The raw bytes of a tensor, without a copy when it is contiguous."""
    if not values.numel():
        return memoryview(b"")
    array = values.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)  # type: ignore[arg-type]  # numpy 1.26 does not declare its buffer
