"""The recursion over one block as matrix products: halves, quarters, ... of the block, down to single columns.

The left half is pruned first, its errors are carried to the right half by one product, then the right half is
pruned. The arithmetic is the column loop's in another order of summation, with a fraction of its memory traffic.

Shape suffixes: B columns (inputs) of the block, O outputs, M columns of an N:M group. `upper_BB` is the block of the
upper Cholesky factor of the inverse Hessian. Columns are rows of the tensors, so each is contiguous.
"""

import torch
from torch import Tensor

from llmprune_kernels.obs.selection import keep_highest


def prune_masked(block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> None:
    """Remove what `keep_BO` does not keep, compensating to the right; overwrites `block_BO` with the result."""
    _Sweep(block_BO, upper_BB, keep_BO).columns(0, len(block_BO))
    block_BO.masked_fill_(~keep_BO, 0)


def prune_nm(block_BO: Tensor, upper_BB: Tensor, n: int, m: int) -> Tensor:
    """As `prune_masked`, keeping `n` of every `m` columns, chosen when their turn comes; returns the mask."""
    keep_BO = torch.ones_like(block_BO, dtype=torch.bool)
    _Sweep(block_BO, upper_BB, keep_BO).groups(0, len(block_BO), n, m)
    block_BO.masked_fill_(~keep_BO, 0)
    return keep_BO


class _Sweep:
    """One pass from left to right over a block."""

    def __init__(self, block_BO: Tensor, upper_BB: Tensor, keep_BO: Tensor) -> None:
        self.block_BO, self.keep_BO = block_BO, keep_BO
        self.lower_BB = upper_BB.T.contiguous()
        self.inverse_B1 = (1 / upper_BB.diagonal()).unsqueeze(1)
        self.charge_BO = self.inverse_B1 * ~keep_BO  # error of a weight = its value x this
        self.error_BO = torch.empty_like(block_BO)

    def columns(self, start: int, stop: int) -> None:
        if stop - start == 1:
            torch.mul(self.block_BO[start], self.charge_BO[start], out=self.error_BO[start])
            return
        middle = (start + stop) // 2
        self.columns(start, middle)
        self.carry(start, middle, stop)
        self.columns(middle, stop)

    def groups(self, start: int, stop: int, n: int, m: int) -> None:
        if stop - start == m:
            self.choose(slice(start, stop), n)
            self.columns(start, stop)
            return
        middle = start + (stop - start) // m // 2 * m
        self.groups(start, middle, n, m)
        self.carry(start, middle, stop)
        self.groups(middle, stop, n, m)

    def carry(self, start: int, middle: int, stop: int) -> None:
        """Charge the right part with the errors of the left one."""
        self.block_BO[middle:stop].addmm_(
            self.lower_BB[middle:stop, start:middle], self.error_BO[start:middle], alpha=-1
        )

    def choose(self, group: slice, n: int) -> None:
        score_MO = (self.block_BO[group] * self.inverse_B1[group]).square_()
        self.keep_BO[group] = keep_highest(score_MO, n)
        self.charge_BO[group] = self.inverse_B1[group] * ~self.keep_BO[group]
