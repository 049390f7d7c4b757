"""The lowest or the highest scores of every row, by selection, with ties broken by place.

Shape suffixes: R rows of a selection, C candidates in a row; G groups of M candidates each.
"""

import numpy as np
import torch
from torch import Tensor

from llmprune import kernels

_CHUNK_ELEMENTS = 1 << 20  # selection copies its scores; a chunk of rows bounds the copy to 4 MiB


def lowest(score_RC: Tensor, count: int) -> Tensor:
    """Mark the `count` lowest scores of every row: exactly that many, among equals the lowest index first.

    A selection, not a sort: O(C) per row; on the CPU in chunks of rows so that the extra memory stays bounded.
    """
    rows, candidates = score_RC.shape
    if count == 0:
        return torch.zeros_like(score_RC, dtype=torch.bool)
    if not is_on_cpu(score_RC):
        return kernels.lowest(score_RC, count)
    step = max(1, _CHUNK_ELEMENTS // candidates)
    if rows <= step:
        return _lowest(score_RC, count)
    return torch.cat([_lowest(chunk, count) for chunk in score_RC.split(step)])


def lowest_of_rows(score_RC: Tensor, counts: list[int]) -> Tensor:
    """Mark the lowest scores of every row, of each as many as `counts` has for it."""
    marked_RC, counts_R = torch.zeros_like(score_RC, dtype=torch.bool), torch.tensor(counts, device=score_RC.device)
    for count in sorted(set(counts)):
        rows = (counts_R == count).nonzero().squeeze(1)
        marked_RC[rows] = lowest(score_RC[rows], count)
    return marked_RC


def highest(score_GM: Tensor, count: int) -> Tensor:
    """Mark the `count` highest scores of every small group: among equals the lowest index is left out first."""
    if not is_on_cpu(score_GM):
        return kernels.keep_highest(score_GM.T.contiguous(), count).T
    marked_GM = kernels.keep_highest_of_groups(score_GM, count)
    return ~lowest(score_GM, score_GM.shape[1] - count) if marked_GM is None else marked_GM


def is_on_cpu(tensor: Tensor) -> bool:
    """Say whether a tensor is where answers that decide what comes next cost nothing."""
    return tensor.device.type == "cpu"


def _lowest(score_RC: Tensor, count: int) -> Tensor:
    kth_R1 = _kth_smallest(score_RC, count)
    marked_RC = score_RC <= kth_R1
    excess_R = _count_true(marked_RC) - count
    if bool((excess_R == 0).all()):
        return marked_RC
    tied = excess_R.nonzero().squeeze(1)  # only the rows in which equal scores straddle the threshold
    marked_RC[tied] = _break_ties(score_RC[tied], kth_R1[tied], count)
    return marked_RC


def _break_ties(score_RC: Tensor, kth_R1: Tensor, count: int) -> Tensor:
    below_RC, equal_RC = score_RC < kth_R1, score_RC == kth_R1
    missing_R1 = count - _count_true(below_RC).unsqueeze(1)
    return below_RC | (equal_RC & (equal_RC.cumsum(1, dtype=torch.int32) <= missing_R1))


def _kth_smallest(score_RC: Tensor, count: int) -> Tensor:
    if len(score_RC) == 1 and kernels.selects(score_RC):
        return torch.full((1, 1), kernels.kth_smallest(score_RC, count), dtype=score_RC.dtype)
    # numpy's vectorised partition: three times torch's kthvalue
    rows = np.partition(_exact(score_RC).numpy(), count - 1, axis=1)
    return torch.from_numpy(rows[:, count - 1 : count].copy())


def _exact(score_RC: Tensor) -> Tensor:
    """Return the scores, unchanged in value, in a dtype that numpy knows."""
    return score_RC if score_RC.dtype == torch.float64 else score_RC.float()


def _count_true(mask_RC: Tensor) -> Tensor:
    if len(mask_RC) == 1:  # without an axis it counts eight times as fast
        return torch.tensor([np.count_nonzero(mask_RC.numpy())])
    return torch.from_numpy(np.count_nonzero(mask_RC.numpy(), axis=1))
