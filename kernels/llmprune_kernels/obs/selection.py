"""Choice of an N:M mask, shared by all forms of the recursion.

Shape suffixes: M columns of a group, O outputs.
"""

import torch
from torch import Tensor


def keep_highest(score_MO: Tensor, n: int) -> Tensor:
    """Mark the `n` highest of each output's M scores; among equals the lowest index goes first.

    Every score is ranked by comparing it with those at distance 1, 2, ... from it. The work grows with the square of
    M, yet no branch depends on the data: up to M = 128 this is faster than a sort or a selection along the outputs.
    """
    m = len(score_MO)
    rank_M1 = torch.arange(m - 1, -1, -1, dtype=torch.int16, device=score_MO.device).unsqueeze(1)
    rank_MO = rank_M1.expand_as(score_MO).contiguous()  # as if each went before all to its right
    for distance in range(1, m):
        left_first = (score_MO[:-distance] <= score_MO[distance:]).view(torch.int8)
        rank_MO[distance:].add_(left_first)
        rank_MO[:-distance].sub_(left_first)
    return rank_MO >= m - n
