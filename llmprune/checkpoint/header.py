"""The header of a safetensors file: where each tensor lies. The library reads tensors; only we overwrite them."""

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from llmprune.errors import CheckpointError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER_BYTES = 16 << 20  # more than 100,000 tensors in one file; the format itself allows 100 MB
_READ_BYTES = 8 << 20


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file: [start, start + size) are its bytes, counted from the beginning of the file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype in torch; raises CheckpointError for those that pruning does not handle (fp8, fp4)."""
        if self.dtype not in DTYPES:
            raise CheckpointError(f"{self.name} is stored as {self.dtype}: dequantize the checkpoint first")
        return DTYPES[self.dtype]


def read_header(path: Path) -> list[TensorEntry]:
    """Return the tensors of a safetensors file in the order of their bytes.

    Raises:
        CheckpointError: the file is not safetensors, ends before its tensors do, or its tensors overlap, leave gaps,
            share a name, or have one that does not print.
    """
    try:
        with path.open("rb") as file:
            size, length = path.stat().st_size, _length(file.read(8))
            if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(f"{path} is truncated or not a safetensors file: download it again")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from None
    try:
        fields = json.loads(text, object_pairs_hook=_unique)
        entries = [_entry(path, name, value, 8 + length) for name, value in fields.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} has an unreadable safetensors header: download it again") from None
    if unprintable := next((entry.name for entry in entries if not entry.name.isprintable()), None):
        raise CheckpointError(f"{path} has a tensor whose name does not print ({unprintable!r}): download it again")
    entries.sort(key=lambda entry: (entry.start, entry.size))
    _require_seamless(path, entries, 8 + length, size)
    return entries


def checksum(entry: TensorEntry) -> int:
    """Read a tensor's bytes once, and return what tells them from others that somebody might put in their place.

    A disk that fails is an error here, but kills the process in mapped memory.

    Raises:
        CheckpointError: they cannot be read.
    """
    return _read_into(memoryview(bytearray(min(entry.size, _READ_BYTES))), entry)


def read(entry: TensorEntry) -> tuple[Tensor, int]:
    """Return a tensor in memory of its own, and the checksum of the bytes that are there.

    Raises:
        CheckpointError: they cannot be read, or their dtype is none that pruning handles.
    """
    dtype, stored = entry.torch_dtype, torch.empty(entry.size, dtype=torch.uint8)
    seen = _read_into(stored.numpy().data, entry)
    return stored.view(dtype).view(entry.shape), seen


def _read_into(memory: memoryview, entry: TensorEntry) -> int:
    """Read a tensor's bytes into memory, over and over again where there is less of it; return their checksum."""
    done, seen = 0, xxhash.xxh3_64()
    try:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start)
            while done < entry.size:
                place = done % len(memory)
                count = file.readinto(memory[place : place + min(_READ_BYTES, entry.size - done)])
                if not count:
                    raise CheckpointError(f"cannot read {entry.name}: {entry.file} is truncated")
                seen.update(memory[place : place + count])
                done += count
    except OSError as error:
        raise CheckpointError(f"cannot read {entry.name} from {entry.file}: {error.strerror}") from None
    return seen.intdigest()


def header_of(entries: Iterable[TensorEntry]) -> TensorEntry:
    """Return what precedes the tensors of a file, as if it were one."""
    first = min(entries, key=lambda entry: entry.start)
    return TensorEntry("the header", first.file, "U8", (first.start,), 0, first.start)


def _length(prefix: bytes) -> int:
    return int(struct.unpack("<Q", prefix)[0]) if len(prefix) == 8 else 0


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a name occurs twice")
    return fields


def _entry(path: Path, name: str, value: dict[str, Any], data_start: int) -> TensorEntry:
    begin, end = value["data_offsets"]
    dtype, shape = value["dtype"], tuple(value["shape"])
    if not isinstance(dtype, str) or not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError("a dtype is a word, a shape and offsets are whole numbers")
    return TensorEntry(name, path, dtype, shape, data_start + begin, end - begin)


def _require_seamless(path: Path, entries: list[TensorEntry], start: int, size: int) -> None:
    """Every byte after the header must belong to exactly one tensor, as the format asks."""
    for entry in entries:
        if entry.start != start or entry.size < 0:
            raise CheckpointError(f"{path}: {entry.name} overlaps another tensor or leaves a gap: download it again")
        wide = DTYPES.get(entry.dtype)
        if wide is not None and entry.size != entry.count * wide.itemsize:
            raise CheckpointError(f"{path}: {entry.name} has {entry.size} bytes, which its shape and dtype contradict")
        start += entry.size
    if start > size:
        raise CheckpointError(f"{path} is truncated: its tensors need {start} bytes, it has {size}; download it again")
    if start < size:
        raise CheckpointError(f"{path} has {size - start} bytes that belong to no tensor: download it again")
