"""The recursion in plain torch (Frantar & Alistarh, 2023, arXiv:2301.00774, algorithm 1, inner loop).

Shape suffixes: B columns (inputs) of the block, O outputs, M columns of an N:M group. `upper_BB` is the block of
the upper Cholesky factor of the inverse Hessian. Columns are rows of the tensors, so each is contiguous.

Every rounding is that of the paper's code: N:M masks are chosen between near-equal scores, and one choice made
otherwise changes all that follow it, so that a whole model would agree with the paper's in 98 % of its mask only.
"""

import torch
from torch import Tensor


def obs_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> Tensor:
    """Remove what `keep_BO` does not keep, compensating to the right.

    Overwrites `block_BO` with the result and returns the errors [B, O] by which later blocks are compensated.
    """
    error_BO = torch.empty_like(block_BO)
    product_BO = torch.empty_like(block_BO)
    for column in range(len(block_BO)):
        _remove(block_BO, upper_BB, keep_BO, error_BO, product_BO, column)
    block_BO.masked_fill_(~keep_BO, 0)
    return error_BO


def obs_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """As `obs_masked`, keeping `n` of every `m` columns, chosen when their turn comes; returns errors and mask."""
    error_BO = torch.empty_like(block_BO)
    product_BO = torch.empty_like(block_BO)
    keep_BO = torch.empty_like(block_BO, dtype=torch.bool)
    squared_B1 = upper_BB.diagonal().square().unsqueeze(1)
    for column in range(len(block_BO)):
        if column % m == 0:
            group = slice(column, column + m)
            keep_BO[group] = _keep_highest(block_BO[group].square() / squared_B1[group], n)
        _remove(block_BO, upper_BB, keep_BO, error_BO, product_BO, column)
    block_BO.masked_fill_(~keep_BO, 0)
    return error_BO, keep_BO


def _remove(
    block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor, error_BO: Tensor, product_BO: Tensor, column: int
) -> None:
    """Charge the columns to the right with the error of removing what column `column` does not keep."""
    error_O = torch.div(block_BO[column], upper_BB[column, column], out=error_BO[column])
    error_O.masked_fill_(keep_BO[column], 0)
    right = slice(column + 1, None)
    # Multiply, then subtract: `addr_` would fuse the two and round once.
    block_BO[right].sub_(torch.mul(upper_BB[column, right].unsqueeze(1), error_O, out=product_BO[right]))


def _keep_highest(score_MO: Tensor, n: int) -> Tensor:
    """Mark the `n` highest of each column of scores; among equals the lowest index goes first."""
    order_MO = score_MO.argsort(dim=0, stable=True)
    return torch.zeros_like(score_MO, dtype=torch.bool).scatter_(0, order_MO[len(order_MO) - n :], True)
