"""Thanos (Ilin & Richtarik, 2025, arXiv:2504.05346, algorithm 1): what a row loses in a block is removed jointly.

SparseGPT removes one column after another, and what it has passed stays as it is. Thanos removes all q weights of a row
that fall in a block of columns at once, and all the others from the block's first column on make up for it (eq. 9):

    w ← w - λ H⁻¹[q, :],   λ H⁻¹[q, q] = w[q],   H of the block's columns and those to their right

The mask of a block is Wanda's, of the weights as they then are, over all that is left to remove in the comparison group.
With H⁻¹ = Uᵀ U, U upper triangular, the rows of the block in the inverse of the remaining Hessian are U[b, b]ᵀ U[b, :],
so one factorisation serves all blocks. (The paper's outlier rows are left out.)

Shape suffixes: O outputs, I inputs, B inputs of one block.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.errors import NumericalError
from llmprune.methods import Solution, require_at_least, require_from_zero
from llmprune.patterns import ComparisonGroup, Pattern, block_width, column_blocks
from llmprune.statistics import Gram

_CHUNK_ELEMENTS = 1 << 22  # of the systems of several rows that are solved at once


@dataclass(frozen=True)
class Thanos:
    """Second-order pruning, jointly per block; `damp` is relative to the mean of the Hessian's diagonal."""

    damp: float = 0.01
    block_size: int = 64
    needs: ClassVar[type[Gram]] = Gram
    row_wise: ClassVar[bool] = False
    comparison_group: ClassVar[ComparisonGroup] = "layer"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "layer", "block")

    def __post_init__(self) -> None:
        require_from_zero(self, "damp")
        require_at_least(self, "block_size", 1)

    def solve(self, weight_OI: Tensor, statistic: Gram, pattern: Pattern, generator: torch.Generator) -> Solution:
        factor = statistic.factor(self.damp)
        norm_I = statistic.hessian_II.diagonal().sqrt()
        solved_OI = weight_OI.float().masked_fill(factor.dead_I, 0)
        score_OI = torch.empty_like(solved_OI)
        for start, stop in column_blocks(solved_OI.shape[1], block_width(pattern, self.block_size)):
            torch.mul(solved_OI[:, start:].abs(), norm_I[start:], out=score_OI[:, start:])
            keep_OB = pattern.keep(score_OI)[:, start:stop]
            score_OI[:, start:stop] = torch.where(keep_OB, torch.inf, -1.0)  # decided
            upper_BI = factor.upper_II[start:stop, start:]
            inverse_BI = upper_BI[:, : stop - start].T @ upper_BI
            lambda_OB = _multipliers(
                solved_OI[:, start:stop], keep_OB, inverse_BI[:, : stop - start], upper_BI[:, : stop - start]
            )
            solved_OI[:, start:].addmm_(lambda_OB, inverse_BI, alpha=-1)
            solved_OI[:, start:stop].masked_fill_(~keep_OB, 0)
        return Solution(solved_OI.to(weight_OI.dtype), score_OI == torch.inf, factor.notes)


def _multipliers(weight_OB: Tensor, keep_OB: Tensor, inverse_BB: Tensor, upper_BB: Tensor) -> Tensor:
    """Solve λ H⁻¹[q, q] = w[q] for each row, q what it does not keep; λ is zero elsewhere.

    Where inputs are nearly alike, Uᵀ U can be indefinite in fp32 though U is sound; in fp64 it is not.
    """
    rows = max(1, _CHUNK_ELEMENTS // inverse_BB.numel())
    found = []
    for block_RB, keep_RB in zip(weight_OB.split(rows), keep_OB.split(rows), strict=True):
        lambda_RB = _solved(block_RB, keep_RB, inverse_BB)
        if lambda_RB is None:
            exact_BB = upper_BB.double()
            lambda_RB = _solved(block_RB.double(), keep_RB, exact_BB.T @ exact_BB)
        if lambda_RB is None:
            raise NumericalError(
                "thanos: the inverse Hessian is not positive definite: raise damp, or use more calibration"
            )
        found.append(lambda_RB.float())
    return torch.cat(found)


def _solved(weight_RB: Tensor, keep_RB: Tensor, inverse_BB: Tensor) -> Tensor | None:
    """Return λ of some rows, or None where H⁻¹[q, q] of one of them is not positive definite."""
    removed_RB = (~keep_RB).to(inverse_BB.dtype)
    system_RBB = inverse_BB * removed_RB.unsqueeze(1) * removed_RB.unsqueeze(2)
    system_RBB.diagonal(dim1=1, dim2=2).add_(keep_RB)  # rows of the identity leave the other unknowns alone
    factor_RBB, failed_R = torch.linalg.cholesky_ex(system_RBB)
    if bool(failed_R.any()):
        return None
    return torch.cholesky_solve((weight_RB * removed_RB).unsqueeze(2), factor_RBB).squeeze(2)
