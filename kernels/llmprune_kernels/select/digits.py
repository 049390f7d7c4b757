"""Selection by counting digits: for GPUs, where a sort is slow and every answer that the host waits for stops them.

The bits of floats, read as integers, sort as the floats do. They are counted digit by digit, the highest first, each
time among those that agree with the threshold so far: two passes over fp32 scores find it exactly. Nothing is read back
to the host, and sums of integers come out the same in any order.

Shape suffixes: R rows, C candidates in a row, B bins.
"""

import torch
from torch import Tensor

_FEW_ROWS = 64  # these have a histogram of 65536 bins each, more have one of 256
_INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}


def lowest(score_RC: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest scores of every row (not NaN): exactly that many, among equals the lowest index first.

    Args:
        score_RC: any floating dtype.
        count: from 1 to C.
    """
    order_RC = _as_integers(score_RC)
    digit = 16 if len(score_RC) <= _FEW_ROWS else 8
    bits, bins = 8 * order_RC.element_size(), 1 << digit
    left_R1 = torch.full((len(score_RC), 1), count, dtype=torch.int64, device=score_RC.device)
    known_R1 = torch.zeros_like(left_R1)  # the threshold's digits so far
    for shift in range(bits - digit, -1, -digit):
        here_RC = order_RC >> shift
        if shift == bits - digit:
            place_RC = here_RC + bins // 2
        else:  # those that differ in an earlier digit are counted beside, in bins of their own
            place_RC = (here_RC & (bins - 1)) + bins * (here_RC >> digit != known_R1)
        found_R1, left_R1 = _reach(_histogram(place_RC, 2 * bins)[:, :bins], left_R1)
        known_R1 = found_R1 - bins // 2 if shift == bits - digit else known_R1 * bins + found_R1
    equal_RC = order_RC == known_R1
    return (order_RC < known_R1) | (equal_RC & (equal_RC.cumsum(1, dtype=torch.int32) <= left_R1))


def _as_integers(score_RC: Tensor) -> Tensor:
    """Return integers in the order of the scores; 0.0 and -0.0 are one."""
    score_RC = (score_RC if score_RC.dtype in _INTEGERS else score_RC.float()) + 0.0
    bits_RC = score_RC.view(_INTEGERS[score_RC.dtype])
    return bits_RC ^ ((bits_RC >> 8 * bits_RC.element_size() - 1) & torch.iinfo(bits_RC.dtype).max)


def _histogram(place_RC: Tensor, bins: int) -> Tensor:
    counts_RB = torch.zeros(len(place_RC), bins, dtype=torch.int32, device=place_RC.device)
    one = torch.ones((), dtype=torch.int32, device=place_RC.device)
    return counts_RB.scatter_add_(1, place_RC.long(), one.expand_as(place_RC))


def _reach(counts_RB: Tensor, left_R1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bin in which the running count reaches what is `left`, and how many of that bin it takes."""
    running_RB = counts_RB.cumsum(1)
    found_R1 = (running_RB < left_R1).sum(1, keepdim=True)
    return found_R1, left_R1 - (running_RB - counts_RB).gather(1, found_R1)
