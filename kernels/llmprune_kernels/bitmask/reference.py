"""What the compiled functions compute, in plain torch and one readable line after the other.

Shape suffixes: O outputs, I inputs, T tokens. `bits` are weights as integers of their own size, so that a weight
counts as zero if all its bits are: -0.0 and NaN of any payload are values, and are kept.
"""

import torch
from torch import Tensor

ROWS, COLUMNS = 8, 32  # of a tile
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def as_bits(weight: Tensor) -> Tensor:
    """Return a view of `weight` as integers of the same size."""
    return weight.view(INTEGERS[weight.element_size()])


def count_bits(masks: Tensor) -> int:
    """Return how many bits of the bytes in a tensor are set."""
    return sum(int(((masks >> place) & 1).sum()) for place in range(8))


def count_values(weight_OI: Tensor) -> Tensor:
    """Return how many weights of each row [O] are values."""
    return torch.cat([(rows != 0).sum(1) for rows in as_bits(weight_OI).split(1024)])


def expand_rows(masks: Tensor, values: Tensor, columns: int) -> Tensor:
    """Return the dense rows [R, columns] of masks [R, ceil(columns / 8)], lowest bit first, and values, row by row."""
    kept = (masks.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
    bits = torch.zeros(len(masks), columns, dtype=INTEGERS[values.element_size()])
    bits[kept.flatten(1)[:, :columns].bool()] = as_bits(values)
    return bits.view(values.dtype)


def tile_view(weight_OI: Tensor) -> Tensor:
    """Return the weight, filled up with zeros, as [tile rows, tile columns, ROWS, COLUMNS]."""
    outputs, inputs = weight_OI.shape
    filled = weight_OI.new_zeros(-(-outputs // ROWS) * ROWS, -(-inputs // COLUMNS) * COLUMNS)
    filled[:outputs, :inputs] = weight_OI
    return filled.view(len(filled) // ROWS, ROWS, -1, COLUMNS).transpose(1, 2)


def pack(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masks, values and offsets of the tile layout."""
    bits = tile_view(as_bits(weight_OI))
    kept = bits != 0
    places = torch.arange(COLUMNS, dtype=torch.int64)
    masks = (kept.long() << places).sum(-1)
    masks = torch.where(masks >= 1 << 31, masks - (1 << 32), masks).to(torch.int32)
    counts = kept.flatten(1).sum(1)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return masks.flatten(), bits[kept].view(weight_OI.dtype), offsets


def expand(masks: Tensor, values: Tensor, outputs: int, inputs: int) -> Tensor:
    """Return the dense weight [O, I] of the tile layout; `values` may have slack at its end."""
    down, across = -(-outputs // ROWS), -(-inputs // COLUMNS)
    kept = ((masks.unsqueeze(-1) >> torch.arange(COLUMNS, dtype=torch.int32)) & 1).bool()
    bits = torch.zeros(kept.shape, dtype=INTEGERS[values.element_size()])
    bits[kept] = as_bits(values)[: int(kept.sum())]
    tiles = bits.view(down, across, ROWS, COLUMNS).transpose(1, 2).reshape(down * ROWS, across * COLUMNS)
    return tiles[:outputs, :inputs].contiguous().view(values.dtype)


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return x times the transposed weight, summed in float32."""
    return x_TI.float() @ weight_OI.float().T
