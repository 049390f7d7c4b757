"""The 2:4 layout that sparse tensor cores read: every lane of a warp finds its operands in one piece.

A weight [O, I] is cut into tiles of 16 rows x 64 columns, filled up with zeros at the edges. One instruction, `mma.sp`
m16n8k32, takes half of a tile: its 32 lanes g * 4 + t hold four words of `values` each, word r two kept values of one
group of four columns, namely group t + 4 (r / 2) of row g + 8 (r % 2). `places` says where in their groups they belong,
2 bits a value: lane g * 4 + t holds groups 4t to 4t + 3 of the tile's row g in its low half, of row g + 8 in its high
half. This is "Matrix fragments for sparse mma.m16n8k32" of the PTX manual, metadata of both halves side by side.
At 16 bits a value that is 9/16 of the dense bytes.
"""

import torch
from torch import Tensor
from torch.nn import functional

from llmprune_kernels.two_four import reference

ROWS, COLUMNS = 16, 64  # of a tile
_AT_ONCE = 1 << 24  # weights: packing takes some 40 bytes for each


def pack(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the values [tile rows, 2 tile columns, 32, 4] and places [tile rows, tile columns, 32], both int32.

    Args:
        weight_OI: bfloat16 or float16, on any device, its number of inputs a multiple of 4.

    Raises:
        ValueError: the weight is of another kind, or not 2:4.
    """
    step = max(1, _AT_ONCE // (weight_OI.shape[1] * ROWS)) * ROWS
    parts = [_pack_rows(rows_OI) for rows_OI in weight_OI.split(step)]
    return torch.cat([values for values, _ in parts]), torch.cat([places for _, places in parts])


def expand(values: Tensor, places: Tensor, outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """Return the dense weight [O, I], bit for bit the one that was packed."""
    down, steps = values.shape[:2]
    pairs = values.view(down, steps, 8, 4, 2, 2).permute(0, 5, 2, 1, 4, 3).reshape(down * ROWS, steps * 8)
    halves = places.view(torch.int16).view(down, steps // 2, 8, 4, 2).permute(0, 4, 2, 1, 3)
    codes = halves.reshape(down * ROWS, steps * 2).view(torch.int32)
    return reference.expand(pairs, codes, dtype)[:outputs, :inputs].contiguous()


def _pack_rows(rows_OI: Tensor) -> tuple[Tensor, Tensor]:
    outputs, inputs = rows_OI.shape
    pairs, codes = reference.pack(functional.pad(rows_OI, (0, -inputs % COLUMNS, 0, -outputs % ROWS)))
    down, across = len(pairs) // ROWS, -(-inputs // COLUMNS)
    # Rows are split into halves h of 8 rows g, the 8 words of 32 columns into halves q of 4 words t.
    values = pairs.view(down, 2, 8, across * 2, 2, 4).permute(0, 3, 2, 5, 4, 1).reshape(down, across * 2, 32, 4)
    halves = codes.view(torch.int16).view(down, 2, 8, across, 4).permute(0, 3, 2, 4, 1)
    return values, halves.reshape(down, across, 64).view(torch.int32)
