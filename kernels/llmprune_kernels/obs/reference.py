"""The recursion in plain torch (Frantar & Alistarh, 2023, arXiv:2301.00774, algorithm 1, inner loop).

Shape suffixes: B columns (inputs) of the block, O outputs, M columns of an N:M group. `upper_BB` is the block of
the upper Cholesky factor of the inverse Hessian. Columns are rows of the tensors, so each is contiguous.

Every rounding is that of the paper's code: N:M masks are chosen between near-equal scores, and one choice made
otherwise changes all that follow it, so that a whole model would agree with the paper's in 98 % of its mask only.
"""

import math

import torch
from torch import Tensor

from llmprune_kernels.obs.selection import keep_highest


def obs_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> Tensor:
    """Remove what `keep_BO` does not keep, compensating to the right.

    Overwrites `block_BO` with the result and returns the errors [B, O] by which later blocks are compensated.
    """
    error_BO = torch.empty_like(block_BO)
    _remove(block_BO, upper_BB, keep_BO, error_BO, slice(0, len(block_BO)))
    block_BO.masked_fill_(~keep_BO, 0)
    return error_BO


def obs_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """As `obs_masked`, keeping `n` of every `m` columns, chosen when their turn comes; returns errors and mask."""
    error_BO = torch.empty_like(block_BO)
    keep_BO = torch.empty_like(block_BO, dtype=torch.bool)
    squared_B1 = upper_BB.diagonal().square().unsqueeze(1)
    for start in range(0, len(block_BO), m):
        group = slice(start, start + m)
        keep_BO[group] = keep_highest(block_BO[group].square() / squared_B1[group], n)
        _remove(block_BO, upper_BB, keep_BO, error_BO, group)
    block_BO.masked_fill_(~keep_BO, 0)
    return error_BO, keep_BO


def _remove(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor, error_BO: Tensor, columns: slice) -> None:
    """Column by column, charge all that lie to the right with the error of removing what is not kept."""
    kept = keep_BO[columns]
    # What stays is divided by infinity: its error is zero.
    divisor = upper_BB.diagonal()[columns].unsqueeze(1).expand_as(kept).masked_fill(kept, math.inf)
    product_BO = torch.empty_like(block_BO)
    for column, divisor_O in zip(range(len(block_BO))[columns], divisor.unbind(), strict=True):
        error_O = torch.div(block_BO[column], divisor_O, out=error_BO[column])
        right_BO, factor_B1 = block_BO[column + 1 :], upper_BB[column, column + 1 :].unsqueeze(1)
        # Multiply, then subtract: `addr_` would fuse the two and round once.
        right_BO.sub_(torch.mul(factor_B1, error_O, out=product_BO[column + 1 :]))
