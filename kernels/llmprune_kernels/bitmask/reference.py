"""What the compiled functions compute, in plain torch and one readable line after the other.

Shape suffixes: O outputs, I inputs, T tokens. `bits` are weights as integers of their own size, so that a weight
counts as zero if all its bits are: -0.0 and NaN of any payload are values, and are kept.
"""

import torch
from torch import Tensor
from torch.nn import functional

ROWS = 8  # whose first value is known
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PLACES = torch.arange(8, dtype=torch.uint8)


def as_bits(weight: Tensor) -> Tensor:
    """Return a view of `weight` as integers of the same size."""
    return weight.view(INTEGERS[weight.element_size()])


def count_values(weight_OI: Tensor) -> Tensor:
    """Return how many weights of each row [O] are values."""
    return torch.cat([(rows != 0).sum(1) for rows in as_bits(weight_OI).split(1024)])


def starts(masks: Tensor) -> Tensor:
    """Return where the values of every `ROWS` rows of masks [O, bytes] begin, and where the last end."""
    counts = torch.stack([((rows.unsqueeze(-1) >> _PLACES) & 1).sum() for rows in masks.split(ROWS)])
    return functional.pad(counts.cumsum(0), (1, 0))


def pack(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the masks [O, ceil(I / 8)], lowest bit first, and the values, row by row."""
    bits = as_bits(weight_OI)
    kept = functional.pad(bits != 0, (0, -bits.shape[1] % 8)).view(len(bits), -1, 8)
    masks = (kept.to(torch.uint8) << _PLACES).sum(-1, dtype=torch.uint8)
    return masks, bits[bits != 0].view(weight_OI.dtype)


def expand(masks: Tensor, values: Tensor, inputs: int) -> Tensor:
    """Return the dense weight [O, inputs]; the number of values must be the number of bits."""
    kept = (masks.unsqueeze(-1) >> _PLACES) & 1
    bits = torch.zeros(len(masks), inputs, dtype=INTEGERS[values.element_size()])
    bits[kept.flatten(1)[:, :inputs].bool()] = as_bits(values)
    return bits.view(values.dtype)


def linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return x times the transposed weight, summed in float32."""
    return x_TI.float() @ weight_OI.float().T
