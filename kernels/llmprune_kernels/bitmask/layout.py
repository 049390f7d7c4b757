"""The tile layout, and the functions on it that are compiled where they can be.

A weight [O, I] is cut into tiles of 8 rows x 32 columns, filled up with zeros at the edges. `masks` holds 32 bits for
each row of each tile, tile row by tile row, tile by tile; `values` the marked weights in that same order, which is the
order in which a matrix-vector product reads them: one stream a tile row, as a memory prefetcher wants it. `offsets`
says where the stream of each tile row begins. At half the zeros that is 1 bit and half a weight: 0.5625 of bfloat16.
Any pattern fits it; 2:4 is a bitmask with two bits in four.
"""

import ctypes
import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from llmprune_kernels.bitmask import reference
from llmprune_kernels.bitmask.reference import COLUMNS, ROWS
from llmprune_kernels.native import cpu_level, declared

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
EXPANDED_BYTES = 16 << 20  # of the weight that are dense at a time while many tokens are multiplied; parts are equal
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
SIGNATURES = {  # as in bitmask.cpp
    "bitmask_pack": (_P, _L, _L, _I, _P, _P, _P, _I),
    "bitmask_expand": (_P, _P, _P, _L, _L, _I, _P, _I, _I),
    "bitmask_nonzero": (_P, _L, _L, _I, _P, _I),
    "bitmask_count": (_P, _L, _P, _I),
    "bitmask_expand_rows": (_P, _P, _L, _L, _I, _P, _I, _I),
    "bitmask_linear": (_P, _P, _P, _L, _L, _I, _P, _L, _P, _I, _I),
}
SLACK = 64  # values after the last: the kernels read whole registers


@dataclass(frozen=True)
class Tiles:
    """A sparse weight [outputs, inputs] in the tile layout."""

    masks: Tensor
    values: Tensor
    offsets: Tensor
    outputs: int
    inputs: int

    @classmethod
    def pack(cls, weight_OI: Tensor) -> "Tiles":
        """Return the weight, of a dtype in `TYPES` and on the CPU, in the tile layout."""
        outputs, inputs = weight_OI.shape
        native = compiled()
        if native is None:
            masks, values, offsets = reference.pack(weight_OI)
            return cls(masks, functional.pad(values, (0, SLACK)), offsets, outputs, inputs)
        weight_OI = weight_OI.contiguous()
        offsets = _offsets(weight_OI)
        masks = torch.empty(len(offsets) - 1, -(-inputs // COLUMNS), ROWS, dtype=torch.int32)
        values = _stream(int(offsets[-1]) + SLACK, weight_OI.dtype)
        values[-SLACK:] = 0
        native.bitmask_pack(
            weight_OI.data_ptr(), outputs, inputs, weight_OI.element_size(),
            masks.data_ptr(), values.data_ptr(), offsets.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return cls(masks.flatten(), values, offsets, outputs, inputs)

    def rows(self, first: int, last: int) -> "Tiles":
        """Return the rows from `first`, a multiple of 8, up to `last`, as a view."""
        start, stop = first // ROWS, -(-last // ROWS)
        across = -(-self.inputs // COLUMNS)
        masks = self.masks[start * across * ROWS : stop * across * ROWS]
        return Tiles(masks, self.values, self.offsets[start : stop + 1], last - first, self.inputs)

    def nbytes(self) -> int:
        """Return the bytes that the tensors occupy."""
        return self.masks.nbytes + self.values.nbytes + self.offsets.nbytes


def expand(tiles: Tiles, out: Tensor | None = None) -> Tensor:
    """Return the dense weight [O, I], bit for bit the one that was packed, in `out` if that is given."""
    native = compiled()
    dense = torch.empty(tiles.outputs, tiles.inputs, dtype=tiles.values.dtype) if out is None else out
    if native is None:
        values = tiles.values[int(tiles.offsets[0]) :]
        return dense.copy_(reference.expand(tiles.masks, values, tiles.outputs, tiles.inputs))
    native.bitmask_expand(
        *_addresses(tiles), tiles.outputs, tiles.inputs, dense.element_size(),
        dense.data_ptr(), torch.get_num_threads(), cpu_level(),
    )  # fmt: skip
    return dense


def multiply(x_TI: Tensor, tiles: Tiles, level: int | None = None) -> Tensor:
    """Return x_TI, of the weight's dtype, times the transposed weight: [T, O] in float32.

    `level` asks for less than the CPU offers; see `llmprune_kernels.native.cpu_level`.
    """
    native = compiled()
    if native is None:
        return reference.linear(x_TI, expand(tiles))
    level = cpu_level() if level is None else level
    if tiles.values.dtype is not torch.bfloat16 or level < 2:
        x_TI = x_TI.float()
    missing = -tiles.inputs % COLUMNS
    x_TI = functional.pad(x_TI, (0, missing)) if missing else x_TI.contiguous()
    y_TO = torch.empty(len(x_TI), tiles.outputs)
    native.bitmask_linear(
        *_addresses(tiles), tiles.outputs, tiles.inputs, TYPES[tiles.values.dtype],
        x_TI.data_ptr(), len(x_TI), y_TO.data_ptr(), torch.get_num_threads(), level,
    )  # fmt: skip
    return y_TO


def multiply_expanded(x_TI: Tensor, tiles: Tiles) -> Tensor:
    """Return what `multiply` does, by torch: a part of the weight is dense at a time, in memory that malloc reuses."""
    y_TO = x_TI.new_empty(len(x_TI), tiles.outputs)
    parts = -(-tiles.outputs * tiles.inputs * x_TI.element_size() // EXPANDED_BYTES)
    step = -(-tiles.outputs // (parts * ROWS)) * ROWS
    part_OI = tiles.values.new_empty(min(step, tiles.outputs), tiles.inputs)
    for first in range(0, tiles.outputs, step):
        last = min(first + step, tiles.outputs)
        dense_OI = expand(tiles.rows(first, last), part_OI[: last - first])
        torch.mm(x_TI, dense_OI.T, out=y_TO[:, first:last])
    return y_TO


def expand_rows(masks: Tensor, values: Tensor, columns: int) -> Tensor:
    """Return the dense rows [R, columns] of masks [R, ceil(columns / 8)], lowest bit first, and values, row by row.

    The number of values must be the number of bits; the caller checks it.
    """
    native = compiled()
    if native is None:
        return reference.expand_rows(masks, values, columns)
    dense = torch.empty(len(masks), columns, dtype=values.dtype)
    native.bitmask_expand_rows(
        masks.data_ptr(), values.data_ptr(), len(masks), columns, values.element_size(),
        dense.data_ptr(), torch.get_num_threads(), cpu_level(),
    )  # fmt: skip
    return dense


def count_bits(masks: Tensor) -> int:
    """Return how many bits of the bytes in a contiguous tensor are set."""
    native = compiled()
    if native is None:
        return reference.count_bits(masks)
    count = torch.zeros(1, dtype=torch.int64)
    native.bitmask_count(masks.data_ptr(), masks.numel(), count.data_ptr(), cpu_level())
    return int(count)


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
    return torch.from_numpy(np.empty(count * dtype.itemsize, np.uint8)).view(dtype)


def _offsets(weight_OI: Tensor) -> Tensor:
    """Return where the values of each tile row begin, and where the last ends."""
    counts_O = count_values(weight_OI)
    counts = functional.pad(counts_O, (0, -len(counts_O) % ROWS)).view(-1, ROWS).sum(1)
    return functional.pad(counts.cumsum(0), (1, 0))


@functools.cache
def compiled() -> ctypes.CDLL | None:
    """Return the library with the arguments of this folder's functions declared, None where there is none."""
    return declared(SIGNATURES)


def _addresses(tiles: Tiles) -> tuple[int, int, int]:
    return tiles.masks.data_ptr(), tiles.values.data_ptr(), tiles.offsets.data_ptr()
