"""Selection for GPUs, where a sort is slow and every answer that the host waits for stops them.

Torch's own selection finds the threshold, in few passes whatever the number of scores; which of the scores that equal it
are marked is decided here, as it leaves that open. Nothing is read back to the host.

Shape suffixes: R rows, C candidates in a row.
"""

import torch
from torch import Tensor


def lowest(score_RC: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest scores of every row (not NaN): exactly that many, among equals the lowest index first.

    Args:
        score_RC: any floating dtype.
        count: from 1 to C.
    """
    kth_R1 = score_RC.topk(count, largest=False, sorted=False).values.amax(1, keepdim=True)
    below_RC, equal_RC = score_RC < kth_R1, score_RC == kth_R1
    left_R1 = count - below_RC.sum(1, keepdim=True)
    return below_RC | (equal_RC & (equal_RC.cumsum(1, dtype=torch.int32) <= left_R1))
