"""The layout of 2:4 weights, and the product with them, in plain torch.

Shape suffixes: O outputs, I inputs, G groups of 4 inputs, T tokens. `pairs` [O, G] holds the two kept 16-bit values of
a group in one int32, the left one in its low half; `codes` [O, G / 8] the places of both, 2 bits each, 4 bits a group,
8 groups an int32, lowest bits first. Where a group has fewer than two values, zeros are kept.
"""

import torch
from torch import Tensor

GROUP = 4
GROUPS_A_WORD = 8
COLUMNS = GROUP * GROUPS_A_WORD  # the inputs must be a multiple of this


def pack(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Return the pairs and codes of a bfloat16 or float16 weight.

    Raises:
        ValueError: the weight is of another size, its inputs are no multiple of 32, or it is not 2:4.
    """
    outputs, inputs = weight_OI.shape
    if weight_OI.element_size() != 2 or inputs % COLUMNS:
        raise ValueError(f"needs 16-bit weights and a multiple of {COLUMNS} inputs, not {weight_OI.dtype}, {inputs}")
    groups = weight_OI.contiguous().view(torch.int16).view(outputs, -1, GROUP)
    empty = groups == 0
    if int(empty.sum(-1).min()) < 2:
        raise ValueError("not 2:4: some group of four columns keeps more than two weights")
    places = empty.to(torch.int8).argsort(dim=-1, stable=True)[..., :2].sort(-1).values
    pairs = groups.gather(-1, places).view(torch.int32).squeeze(-1)
    codes = (places[..., 0] | places[..., 1] << 2).view(outputs, -1, GROUPS_A_WORD)
    words = (codes << 4 * torch.arange(GROUPS_A_WORD, device=codes.device)).sum(-1)
    return pairs.contiguous(), _as_int32(words)


def expand(pairs_OG: Tensor, codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the dense weight [O, I]."""
    shifts = 4 * torch.arange(GROUPS_A_WORD, device=codes.device)
    code_OG = (codes.unsqueeze(-1) >> shifts & 15).flatten(1)
    places = torch.stack([code_OG & 3, code_OG >> 2], -1)
    groups = torch.zeros(*code_OG.shape, GROUP, dtype=torch.int16, device=codes.device)
    groups.scatter_(-1, places, pairs_OG.unsqueeze(-1).view(torch.int16))
    return groups.flatten(1).view(dtype)


def linear(x_TI: Tensor, pairs_OG: Tensor, codes: Tensor) -> Tensor:
    """Return x times the transposed weight, summed in float32, in the dtype of x."""
    weight_OI = expand(pairs_OG, codes, x_TI.dtype)
    return (x_TI.float() @ weight_OI.float().T).to(x_TI.dtype)


def _as_int32(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
