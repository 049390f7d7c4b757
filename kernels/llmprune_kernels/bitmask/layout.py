"""The layout of compressed files and of the CPU's kernels, and the functions on it that are compiled where they can be.

`masks` [O, ceil(I / 8)] holds a bit for each weight of a row, lowest bit first, and `values` the marked weights row by
row: the order in which a matrix-vector product reads them, as one stream. `starts` says where the values of every eighth
row begin, so that threads need not count. At half the zeros that is 1 bit and half a weight: 0.5625 of bfloat16. Any
pattern fits it; 2:4 is a bitmask with two bits in four. A file that is mapped into memory is multiplied where it lies.
"""

import ctypes
import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from llmprune_kernels.bitmask import reference
from llmprune_kernels.bitmask.reference import ROWS
from llmprune_kernels.native import cpu_level, declared

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EXPANDED_BYTES = 16 << 20  # of the weight that are dense at a time while many tokens are multiplied; parts are equal
_COLUMNS = 32  # that the kernels read of a row of x at a time
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
SIGNATURES = {  # as in bitmask.cpp
    "bitmask_starts": (_P, _L, _L, _P, _I, _I),
    "bitmask_nonzero": (_P, _L, _L, _I, _P, _I),
    "bitmask_pack": (_P, _L, _L, _I, _P, _P, _P, _I),
    "bitmask_expand": (_P, _P, _P, _L, _L, _I, _P, _I, _I),
    "bitmask_linear": (_P, _P, _P, _L, _L, _I, _P, _L, _P, _I, _I),
}


@dataclass(frozen=True)
class Bitmask:
    """A sparse weight [outputs, inputs] on the CPU; `values` may go on behind those of the last row."""

    masks: Tensor
    values: Tensor
    starts: Tensor
    inputs: int

    @property
    def outputs(self) -> int:
        """The number of rows."""
        return len(self.masks)

    @classmethod
    def of(cls, masks: Tensor, values: Tensor, inputs: int) -> "Bitmask":
        """Return the weight of masks and values as a file has them, which are not copied."""
        native = compiled()
        if native is None:
            return cls(masks, values, reference.starts(masks), inputs)
        starts = torch.empty(-(-len(masks) // ROWS) + 1, dtype=torch.int64)
        native.bitmask_starts(
            masks.data_ptr(), len(masks), inputs, starts.data_ptr(), torch.get_num_threads(), cpu_level()
        )
        return cls(masks, values, starts, inputs)

    @classmethod
    def pack(cls, weight_OI: Tensor) -> "Bitmask":
        """Return a dense weight, of a dtype in `TYPES` and on the CPU, in this layout."""
        native = compiled()
        if native is None:
            return cls.of(*reference.pack(weight_OI), weight_OI.shape[1])
        weight_OI = weight_OI.contiguous()
        outputs, inputs = weight_OI.shape
        starts = _starts(count_values(weight_OI))
        masks = torch.empty(outputs, -(-inputs // 8), dtype=torch.uint8)
        values = _stream(int(starts[-1]), weight_OI.dtype)
        native.bitmask_pack(
            weight_OI.data_ptr(), outputs, inputs, weight_OI.element_size(),
            masks.data_ptr(), values.data_ptr(), starts.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return cls(masks, values, starts, inputs)

    def rows(self, first: int, last: int) -> "Bitmask":
        """Return the rows from `first`, a multiple of 8, up to `last`, as a view."""
        starts = self.starts[first // ROWS : -(-last // ROWS) + 1]
        return Bitmask(self.masks[first:last], self.values, starts, self.inputs)

    def count(self) -> int:
        """Return how many values there are."""
        return int(self.starts[-1] - self.starts[0])

    def nbytes(self) -> int:
        """Return the bytes that the tensors occupy."""
        return self.masks.nbytes + self.values.nbytes + self.starts.nbytes


def expand(matrix: Bitmask, out: Tensor | None = None) -> Tensor:
    """Return the dense weight [O, I], bit for bit the one that was packed, in `out` if that is given.

    The elements of `values` may have any size that a number has: 1, 2, 4 or 8 bytes.
    """
    native = compiled()
    dense = torch.empty(matrix.outputs, matrix.inputs, dtype=matrix.values.dtype) if out is None else out
    if native is None:
        values = matrix.values[int(matrix.starts[0]) : int(matrix.starts[-1])]
        return dense.copy_(reference.expand(matrix.masks, values, matrix.inputs))
    native.bitmask_expand(
        *_addresses(matrix), matrix.outputs, matrix.inputs, dense.element_size(),
        dense.data_ptr(), torch.get_num_threads(), cpu_level(),
    )  # fmt: skip
    return dense


def multiply(x_TI: Tensor, matrix: Bitmask, level: int | None = None) -> Tensor:
    """Return x_TI, of the weight's dtype, times the transposed weight: [T, O] in float32.

    `level` asks for less than the CPU offers; see `llmprune_kernels.native.cpu_level`.
    """
    native = compiled()
    if native is None:
        return reference.linear(x_TI, expand(matrix))
    level = cpu_level() if level is None else level
    if matrix.values.dtype is not torch.bfloat16 or level < 2:
        x_TI = x_TI.float()
    missing = -matrix.inputs % _COLUMNS
    x_TI = functional.pad(x_TI, (0, missing)) if missing else x_TI.contiguous()
    y_TO = torch.empty(len(x_TI), matrix.outputs, dtype=torch.float32)
    native.bitmask_linear(
        *_addresses(matrix), matrix.outputs, matrix.inputs, TYPES[matrix.values.dtype],
        x_TI.data_ptr(), len(x_TI), y_TO.data_ptr(), torch.get_num_threads(), level,
    )  # fmt: skip
    return y_TO


def multiply_expanded(x_TI: Tensor, matrix: Bitmask) -> Tensor:
    """Return what `multiply` does, by torch: a part of the weight is dense at a time, in memory that malloc reuses."""
    y_TO = x_TI.new_empty(len(x_TI), matrix.outputs)
    parts = -(-matrix.outputs * matrix.inputs * x_TI.element_size() // EXPANDED_BYTES)
    step = -(-matrix.outputs // (parts * ROWS)) * ROWS
    part_OI = matrix.values.new_empty(min(step, matrix.outputs), matrix.inputs)
    for first in range(0, matrix.outputs, step):
        last = min(first + step, matrix.outputs)
        dense_OI = expand(matrix.rows(first, last), part_OI[: last - first])
        torch.mm(x_TI, dense_OI.T, out=y_TO[:, first:last])
    return y_TO


def count_values(weight_OI: Tensor) -> Tensor:
    """Return how many weights of each row [O] are values: not zero in all their bits."""
    native = compiled()
    if native is None or weight_OI.device.type != "cpu" or weight_OI.dtype not in TYPES:
        return reference.count_values(weight_OI)
    weight_OI = weight_OI.contiguous()
    counts_O = torch.empty(len(weight_OI), dtype=torch.int64)
    native.bitmask_nonzero(
        weight_OI.data_ptr(), *weight_OI.shape, weight_OI.element_size(), counts_O.data_ptr(), torch.get_num_threads()
    )
    return counts_O


def _stream(count: int, dtype: torch.dtype) -> Tensor:
    """Return room for values that are read in one go: numpy asks the system for large pages, torch does not."""
    return torch.from_numpy(np.empty(count, f"i{dtype.itemsize}")).view(dtype)


def _starts(counts_O: Tensor) -> Tensor:
    """Return where the values of each group of rows begin, and where the last ends."""
    counts = functional.pad(counts_O, (0, -len(counts_O) % ROWS)).view(-1, ROWS).sum(1)
    return functional.pad(counts.cumsum(0), (1, 0))


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """Return the library with the arguments of this folder's functions declared, None where there is none."""
    return declared(SIGNATURES)


def _addresses(matrix: Bitmask) -> tuple[int, int, int]:
    return matrix.masks.data_ptr(), matrix.values.data_ptr(), matrix.starts.data_ptr()
