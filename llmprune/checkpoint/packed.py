"""One tensor as a bitmask and its values, in one buffer of bytes: what a compressed checkpoint stores under its name.

    8 bytes    magic, with the version of the layout as its last byte
    8 bytes    name of the dtype in safetensors, such as BF16, filled up with zeros
    8 bytes    bytes of an element
    8 bytes    number of dimensions, then 8 bytes for each of them
    bitmask    of each row (along the last dimension) ceil(columns / 8) bytes, lowest bit first
    zeros      up to a multiple of 8 bytes
    values     the elements whose bit is set, in order
    zeros      up to a multiple of 8 bytes

Numbers are little-endian. An element's bit is clear if all bits of the element are: -0.0 and NaN are values, so every
tensor of every dtype comes back bit for bit. One buffer, not a tensor for each part, so that loaders which rename or
merge tensors by their names treat a packed tensor as they would the dense one, and loaders that do not know the format
stop at its shape.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmprune.checkpoint.header import DTYPES
from llmprune.errors import CheckpointError
from llmprune_kernels.bitmask.layout import Bitmask, expand
from llmprune_kernels.bitmask.reference import INTEGERS

MAGIC = b"llmprun"
VERSION = 1
_INTEGERS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_CHUNK = 1 << 22  # elements packed at a time
_FIXED = 32  # bytes before the dimensions

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """The dtype and shape of a packed tensor, and where its parts lie."""

    dtype: str
    shape: tuple[int, ...]
    size: int  # bytes of an element
    mask_at: int
    values_at: int

    @classmethod
    def of(cls, dtype: str, shape: tuple[int, ...], size: int) -> "Layout":
        """Return the layout for a tensor."""
        mask_at = _FIXED + 8 * len(shape)
        rows, columns = rows_and_columns(shape)
        return cls(dtype, shape, size, mask_at, _whole(mask_at + rows * _bytes(columns)))

    def packed_bytes(self, values: int) -> int:
        """Return the length of the buffer that holds `values` values."""
        return _whole(self.values_at + values * self.size)

    def prefix(self) -> bytes:
        """Return what comes before the bitmask."""
        numbers = (self.size, len(self.shape), *self.shape)
        return (
            MAGIC + bytes([VERSION]) + self.dtype.encode().ljust(8, b"\0") + struct.pack(f"<{len(numbers)}Q", *numbers)
        )


def rows_and_columns(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape as that of a matrix whose rows run along the last dimension."""
    return math.prod(shape[:-1]), shape[-1]


def can_pack(shape: tuple[int, ...], count: int, nbytes: int) -> bool:
    """Say whether a tensor is a matrix, or several, of whole-byte elements."""
    return len(shape) >= 2 and count > 0 and nbytes % count == 0 and nbytes // count in _INTEGERS


def is_packed(tensor: Tensor) -> bool:
    """Say whether a tensor that was read from a file is a packed one."""
    if tensor.dtype is not torch.uint8 or tensor.ndim != 1 or len(tensor) < _FIXED:
        return False
    return bytes(tensor[: len(MAGIC)].tolist()) == MAGIC


def pack(dense: Bytes, layout: Layout) -> Bytes:
    """Return the bytes of a dense tensor, packed."""
    rows, columns = rows_and_columns(layout.shape)
    elements = dense.view(_INTEGERS[layout.size]).reshape(rows, columns)
    step = max(1, _CHUNK // columns)
    kept = [elements[first : first + step] != 0 for first in range(0, rows, step)]
    packed = np.zeros(layout.packed_bytes(sum(int(part.sum()) for part in kept)), np.uint8)
    packed[: layout.mask_at] = np.frombuffer(layout.prefix(), np.uint8)
    mask_at, values_at = layout.mask_at, layout.values_at
    for number, part in enumerate(kept):
        bits = np.packbits(part, axis=1, bitorder="little").reshape(-1)
        values = elements[number * step : number * step + len(part)][part].view(np.uint8)
        packed[mask_at : mask_at + len(bits)] = bits
        packed[values_at : values_at + len(values)] = values
        mask_at, values_at = mask_at + len(bits), values_at + len(values)
    return packed


def values_of(dense: Bytes, size: int) -> int:
    """Return how many elements of a dense tensor are not all zero bits."""
    elements = dense.view(_INTEGERS[size])
    return sum(int(np.count_nonzero(elements[first : first + _CHUNK])) for first in range(0, len(elements), _CHUNK))


def matrix_of(packed: Bytes, name: str) -> tuple[Layout, Bitmask]:
    """Return the layout of a packed tensor and, where it lies, the matrix of its elements as integers of their size.

    Raises:
        CheckpointError: naming the tensor, the version is a newer one, or bitmask and values contradict each other.
    """
    if packed[7] != VERSION:
        raise CheckpointError(f"{name} is packed in format {packed[7]}, this llmprune reads {VERSION}: upgrade it")
    dtype = packed[8:16].tobytes().rstrip(b"\0").decode("ascii", "replace")
    size, dimensions = struct.unpack("<QQ", packed[16:_FIXED].tobytes())
    known = DTYPES[dtype].itemsize if dtype in DTYPES else size
    if size not in _INTEGERS or size != known or not 2 <= dimensions <= (len(packed) - _FIXED) // 8:
        raise _damaged(name)
    shape = struct.unpack(f"<{dimensions}Q", packed[_FIXED : _FIXED + 8 * dimensions].tobytes())
    layout = Layout.of(dtype, shape, size)
    if 0 in shape or len(packed) < layout.values_at or len(packed) % 8:
        raise _damaged(name)
    rows, columns = rows_and_columns(layout.shape)
    masks = torch.from_numpy(packed[layout.mask_at : layout.mask_at + rows * _bytes(columns)]).view(rows, -1)
    matrix = Bitmask.of(masks, torch.from_numpy(packed[layout.values_at :]).view(INTEGERS[size]), columns)
    behind = columns % 8 and bool((masks[:, -1] >> columns % 8).any())  # bits of columns that there are not
    if behind or len(packed) != layout.packed_bytes(matrix.count()):
        raise _damaged(name)
    return layout, matrix


def dense_parts(packed: Bytes, name: str, step: int) -> Iterator[Tensor]:
    """Yield the dense elements of a packed tensor, as integers of their size, `step` rows of its first dimension at a time.

    Raises:
        CheckpointError: as `matrix_of`.
    """
    layout, matrix = matrix_of(packed, name)
    rows_of_one, first_value = matrix.outputs // layout.shape[0], 0
    for first in range(0, layout.shape[0], step):
        shape = (min(step, layout.shape[0] - first), *layout.shape[1:])
        masks = matrix.masks[first * rows_of_one :][: shape[0] * rows_of_one]
        part = Bitmask.of(masks, matrix.values[first_value:], matrix.inputs)
        yield expand(part).view(shape)
        first_value += part.count()


def count_zero_values(packed: Bytes, name: str) -> int:
    """Return how many of the values of a packed tensor are zero, all bits of them.

    Raises:
        CheckpointError: as `matrix_of`.
    """
    _, matrix = matrix_of(packed, name)
    return matrix.count() - int(matrix.values[: matrix.count()].count_nonzero())


def typed_matrix(packed: Tensor, name: str) -> tuple[Layout, Bitmask]:
    """Return what `matrix_of` does, with the elements' own dtype.

    Raises:
        CheckpointError: as `matrix_of`, or its dtype is none that torch and llmprune share.
    """
    layout, matrix = matrix_of(packed.numpy(), name)
    if layout.dtype not in DTYPES:
        raise CheckpointError(f"{name} is stored as {layout.dtype}: restore the checkpoint with `llmprune decompress`")
    return layout, replace(matrix, values=matrix.values.view(DTYPES[layout.dtype]))


def dense_tensor(packed: Tensor, name: str) -> Tensor:
    """Return the tensor that was packed.

    Raises:
        CheckpointError: as `typed_matrix`.
    """
    layout, matrix = typed_matrix(packed, name)
    return expand(matrix).view(layout.shape)


def _damaged(name: str) -> CheckpointError:
    return CheckpointError(f"{name}: its bitmask and values contradict each other; download or compress it again")


def _bytes(columns: int) -> int:
    return -(-columns // 8)


def _whole(count: int) -> int:
    return -(-count // 8) * 8
