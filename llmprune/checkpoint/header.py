"""The header of a safetensors file: where each tensor lies. The library reads tensors; only we overwrite them."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmprune.errors import CheckpointError

_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


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
        CheckpointError: the file is not safetensors, or ends before its tensors do.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(_MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{path} is truncated or not a safetensors file: download it again")
        text = file.read(length)
    try:
        fields = json.loads(text)
        entries = [_entry(path, name, value, 8 + length) for name, value in fields.items() if name != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{path} has an unreadable safetensors header: download it again") from None
    entries.sort(key=lambda entry: entry.start)
    _require_complete(path, entries, size)
    return entries


def _entry(path: Path, name: str, value: dict[str, Any], data_start: int) -> TensorEntry:
    begin, end = value["data_offsets"]
    return TensorEntry(name, path, value["dtype"], tuple(value["shape"]), data_start + begin, end - begin)


def _require_complete(path: Path, entries: list[TensorEntry], size: int) -> None:
    end = max((entry.start + entry.size for entry in entries), default=0)
    if end > size:
        raise CheckpointError(f"{path} is truncated: its tensors need {end} bytes, it has {size}; download it again")
    for entry in entries:
        wide = DTYPES.get(entry.dtype)
        if wide is not None and entry.size != entry.count * wide.itemsize:
            raise CheckpointError(f"{path}: {entry.name} has {entry.size} bytes, which its shape and dtype contradict")
