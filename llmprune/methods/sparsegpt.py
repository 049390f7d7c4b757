"""SparseGPT (Frantar & Alistarh, ICML 2023, arXiv:2301.00774, algorithm 1).

Column by column, the error of removing a weight is compensated by the weights to its right. The mask of a block of
128 columns is chosen when the block is reached, N:M masks when their M columns are reached, so both see the
compensations made so far.

The operations and their order are those of the paper's code, so masks come out the same to the bit where the inputs
do; only the count differs, which here is exact (the paper's threshold `<=` removes one weight more per block).

Shape suffixes: O outputs, I inputs, B inputs of one block. Matrices are held transposed (I first) so that a column
of weights is contiguous.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune import kernels
from llmprune.errors import PatternError, RecipeError
from llmprune.methods import Solution
from llmprune.patterns import NM, ComparisonGroup, Pattern, Unstructured, column_blocks
from llmprune.statistics import Gram


@dataclass(frozen=True)
class SparseGPT:
    """Second-order pruning with weight updates; `damp` is relative to the mean of the Hessian's diagonal."""

    damp: float = 0.01
    block_size: int = 128
    needs: ClassVar[type[Gram]] = Gram
    row_wise: ClassVar[bool] = False
    comparison_group: ClassVar[ComparisonGroup] = "block"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "block")

    def __post_init__(self) -> None:
        if not 0 <= self.damp < math.inf:
            raise RecipeError(f"method 'sparsegpt': damp must be a number of at least 0, not {self.damp}")
        if self.block_size < 1:
            raise RecipeError(f"method 'sparsegpt': block_size must be at least 1, not {self.block_size}")

    def solve(self, weight_OI: Tensor, statistic: Gram, pattern: Pattern, generator: torch.Generator) -> Solution:
        factor = statistic.factor(self.damp)
        weight_IO = weight_OI.T.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        weight_IO[factor.dead_I] = 0
        keep_IO = torch.empty_like(weight_IO, dtype=torch.bool)
        for start, stop in column_blocks(weight_IO.shape[0], self._block_width(pattern)):
            block_BO, upper_BB = weight_IO[start:stop], factor.upper_II[start:stop, start:stop]
            error_BO, keep_IO[start:stop] = _prune_block(block_BO, upper_BB, pattern, start)
            weight_IO[stop:].sub_(factor.upper_II[start:stop, stop:].T @ error_BO)
        return Solution(weight_IO.T.to(weight_OI.dtype), keep_IO.T, factor.notes)

    def _block_width(self, pattern: Pattern) -> int:
        """N:M groups must not straddle blocks."""
        m = pattern.m if isinstance(pattern, NM) else 1
        return max(self.block_size // m * m, m)


def _prune_block(block_BO: Tensor, upper_BB: Tensor, pattern: Pattern, start: int) -> tuple[Tensor, Tensor]:
    """Prune one compensated block in place; return the errors that later columns have to compensate, and the mask."""
    if isinstance(pattern, NM):
        return kernels.obs_nm(block_BO, upper_BB, pattern.n, pattern.m)
    if not isinstance(pattern, Unstructured):
        raise PatternError(f"sparsegpt chooses its masks block by block; it cannot follow {pattern}")
    score_BO = block_BO.square() / upper_BB.diagonal().square().unsqueeze(1)
    keep_BO = pattern.keep_block(score_BO.T, start).T.contiguous()
    return kernels.obs_masked(block_BO, upper_BB, keep_BO), keep_BO
