"""SparseGPT (Frantar & Alistarh, ICML 2023, arXiv:2301.00774, algorithm 1).

Column by column, the error of removing a weight is compensated by the weights to its right. The mask of a block of
128 columns is chosen when the block is reached, N:M masks when their M columns are reached, so both see the
compensations made so far.

This is the paper's recursion in another order of operations. With H = R Rᵀ (see `statistics.Factor`), U = R⁻¹ and
D = W - Q the change of the columns done so far, the compensated block b is W_b + (D_{<b} R_{<b,b}) R_bb⁻¹: each
block is written once, reading what lies to its left, and no inverse of full size is needed.

Shape suffixes: O outputs, I inputs, B inputs of one block. Matrices are held transposed (I first) so that a column
of weights is contiguous.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune import kernels
from llmprune.errors import PatternError
from llmprune.methods import Solution
from llmprune.patterns import NM, ComparisonGroup, Pattern, Unstructured, column_blocks
from llmprune.statistics import Gram


@dataclass(frozen=True)
class SparseGPT:
    """Second-order pruning with weight updates; `damp` is relative to the mean of the Hessian's diagonal."""

    damp: float = 0.01
    block_size: int = 128
    needs: ClassVar[type[Gram]] = Gram
    comparison_group: ClassVar[ComparisonGroup] = "block"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "block")

    def solve(self, weight_OI: Tensor, statistic: Gram, pattern: Pattern, generator: torch.Generator) -> Solution:
        factor = statistic.factor(self.damp)
        weight_IO = weight_OI.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        weight_IO[factor.dead_I] = 0
        keep_IO = torch.empty_like(weight_IO, dtype=torch.bool)
        change_IO = torch.empty_like(weight_IO)
        for start, stop in column_blocks(weight_IO.shape[0], self._block_width(pattern)):
            upper_BB = _inverse_upper(factor.upper_II[start:stop, start:stop])
            carried_BO = factor.upper_II[:start, start:stop].T @ change_IO[:start]
            block_BO = torch.addmm(weight_IO[start:stop], upper_BB.T, carried_BO)
            keep_IO[start:stop] = _prune_block(block_BO, upper_BB, pattern, start)
            change_IO[start:stop] = weight_IO[start:stop] - block_BO
            weight_IO[start:stop] = block_BO
        return Solution(weight_IO.T.to(weight_OI.dtype), keep_IO.T, factor.notes)

    def _block_width(self, pattern: Pattern) -> int:
        """N:M groups must not straddle blocks."""
        m = pattern.m if isinstance(pattern, NM) else 1
        return max(self.block_size // m * m, m)


def _inverse_upper(upper_BB: Tensor) -> Tensor:
    identity_BB = torch.eye(len(upper_BB), dtype=upper_BB.dtype, device=upper_BB.device)
    inverse_BB: Tensor = torch.linalg.solve_triangular(upper_BB, identity_BB, upper=True)
    return inverse_BB


def _prune_block(block_BO: Tensor, upper_BB: Tensor, pattern: Pattern, start: int) -> Tensor:
    """Prune one compensated block in place and return its mask."""
    if isinstance(pattern, NM):
        return kernels.obs_nm(block_BO, upper_BB, pattern.n, pattern.m)
    if not isinstance(pattern, Unstructured):
        raise PatternError(f"sparsegpt chooses its masks block by block; it cannot follow {pattern}")
    score_BO = block_BO / upper_BB.diagonal().unsqueeze(1)
    keep_BO = pattern.keep_block(score_BO.square_().T, start).T.contiguous()
    kernels.obs_masked(block_BO, upper_BB, keep_BO)
    return keep_BO
