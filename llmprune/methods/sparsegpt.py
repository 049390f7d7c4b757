"""SparseGPT (Frantar & Alistarh, ICML 2023, arXiv:2301.00774, algorithm 1).

Column by column, the error of removing a weight is compensated by the weights to its right. The mask of a block of
128 columns is chosen when the block is reached, N:M masks when their M columns are reached, so both see the
compensations made so far.

In `paper` arithmetic the operations and their order are those of the paper's code, so masks come out the same to the
bit where the inputs do; only the count differs, which here is exact (the paper's threshold `<=` removes one weight
more per block).

`fast` arithmetic solves the same recursion in another order. With H = R Rᵀ, U = R⁻¹ and D = W - Q the change of the
columns done so far, block b starts from W_b + (D_{<b} R_{<b,b}) R_bb⁻¹: one factorisation in place of three, no
inverse of full size, and the products are summed in large halves. (The step is Babai's nearest plane, as shown for
quantisation in arXiv:2507.18553.)

Shape suffixes: O outputs, I inputs, B inputs of one block. Matrices are held transposed (I first) so that a column
of weights is contiguous.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune import kernels
from llmprune.methods import Solution, require_arithmetic, require_at_least, require_from_zero
from llmprune.patterns import NM, ComparisonGroup, Pattern, block_width, column_blocks
from llmprune.statistics import FactorKind, Gram

Block = tuple[int, int]
_FACTORS: dict[str, FactorKind] = {"paper": "inverse", "fast": "root"}  # that each arithmetic works from


@dataclass(frozen=True)
class SparseGPT:
    """Second-order pruning with weight updates; `damp` is relative to the mean of the Hessian's diagonal."""

    damp: float = 0.01
    block_size: int = 128
    arithmetic: str = "paper"
    needs: ClassVar[type[Gram]] = Gram
    row_wise: ClassVar[bool] = False
    comparison_group: ClassVar[ComparisonGroup] = "block"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "block")

    def __post_init__(self) -> None:
        require_from_zero(self, "damp")
        require_at_least(self, "block_size", 1)
        require_arithmetic(self)

    def solve(self, weight_OI: Tensor, statistic: Gram, pattern: Pattern, generator: torch.Generator) -> Solution:
        factor = statistic.factor(self.damp, _FACTORS[self.arithmetic])
        weight_IO = torch.empty_like(weight_OI.T, dtype=torch.float32, memory_format=torch.contiguous_format)
        weight_IO.copy_(weight_OI.T)  # four times as fast as `to`
        weight_IO.masked_fill_(factor.dead_I.unsqueeze(1), 0)
        blocks = column_blocks(weight_IO.shape[0], block_width(pattern, self.block_size))
        change_O = None
        if self.arithmetic == "paper":
            keep_IO = _paper_sweep(weight_IO, factor.upper_II, pattern, blocks)
        else:
            keep_IO, damped_O, square_O = _fast_sweep(weight_IO, factor.upper_II, pattern, blocks)
            change_O = statistic.undamped(damped_O, square_O, factor.damp)
        return Solution(weight_IO.T.to(weight_OI.dtype), keep_IO.T, factor.notes, change_O)


def _paper_sweep(weight_IO: Tensor, upper_II: Tensor, pattern: Pattern, blocks: list[Block]) -> Tensor:
    """Prune block after block in place, each compensated by all that lie to its right; return the mask."""
    keep_IO = torch.empty_like(weight_IO, dtype=torch.bool)
    for start, stop in blocks:
        block_BO, upper_BB = weight_IO[start:stop], upper_II[start:stop, start:stop]
        if isinstance(pattern, NM):
            error_BO, keep_IO[start:stop] = kernels.obs_nm(block_BO, upper_BB, pattern.n, pattern.m)
        else:
            keep_IO[start:stop] = _keep_block(block_BO, upper_BB, pattern, start)
            error_BO = kernels.obs_masked(block_BO, upper_BB, keep_IO[start:stop])
        weight_IO[stop:].sub_(upper_II[start:stop, stop:].T @ error_BO)
    return keep_IO


def _fast_sweep(
    weight_IO: Tensor, root_II: Tensor, pattern: Pattern, blocks: list[Block]
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_paper_sweep`, from R: the left half of the blocks is pruned, then its changes are carried to the right.

    Also return |d R|² and |d|² of each row's change d.
    """
    sweep = _FastSweep(
        weight_IO,
        root_II,
        pattern,
        _inverse_blocks(root_II, blocks),
        keep_IO=torch.empty_like(weight_IO, dtype=torch.bool),
        change_IO=torch.empty_like(weight_IO),
        carried_IO=torch.zeros_like(weight_IO),
    )
    with kernels.tf32(weight_IO.device):
        sweep.prune(blocks)
    damped_O, square_O = (x_IO.square_().sum(0) for x_IO in (sweep.carried_IO, sweep.change_IO))  # of no more use
    return sweep.keep_IO, damped_O, square_O


@dataclass(frozen=True)
class _FastSweep:
    """What `_fast_sweep` works on; no nested functions, as one that calls itself would keep all of it from being freed.

    `carried_IO` is what earlier blocks put on a block, (D_{<b} R_{<b,b})ᵀ, until it is pruned; then (D R)ᵀ.
    """

    weight_IO: Tensor
    root_II: Tensor
    pattern: Pattern
    inverses: dict[int, Tensor]
    keep_IO: Tensor
    change_IO: Tensor
    carried_IO: Tensor

    def prune(self, blocks: list[Block]) -> None:
        if len(blocks) == 1:
            self._prune_block(*blocks[0])
            return
        left, right = blocks[: len(blocks) // 2], blocks[len(blocks) // 2 :]
        start, middle, stop = left[0][0], right[0][0], right[-1][1]
        self.prune(left)
        self.carried_IO[middle:stop].addmm_(self.root_II[start:middle, middle:stop].T, self.change_IO[start:middle])
        self.prune(right)

    def _prune_block(self, start: int, stop: int) -> None:
        upper_BB, pattern = self.inverses[start], self.pattern
        block_BO = torch.addmm(self.weight_IO[start:stop], upper_BB.T, self.carried_IO[start:stop])
        if isinstance(pattern, NM):
            self.keep_IO[start:stop] = kernels.prune_nm(block_BO, upper_BB, pattern.n, pattern.m)
        else:
            self.keep_IO[start:stop] = _keep_block(block_BO, upper_BB, pattern, start)
            kernels.prune_masked(block_BO, upper_BB, self.keep_IO[start:stop])
        change_BO = torch.sub(self.weight_IO[start:stop], block_BO, out=self.change_IO[start:stop])
        self.carried_IO[start:stop].addmm_(self.root_II[start:stop, start:stop].T, change_BO)
        self.weight_IO[start:stop] = block_BO


def _keep_block(block_BO: Tensor, upper_BB: Tensor, pattern: Pattern, start: int) -> Tensor:
    """Choose the mask of one compensated block."""
    score_BO = block_BO.square() / upper_BB.diagonal().square().unsqueeze(1)
    return pattern.keep_block(score_BO.T, start).T


def _inverse_blocks(root_II: Tensor, blocks: list[Block]) -> dict[int, Tensor]:
    """Return the inverse of every block on the diagonal of R, by its start; those of one width at once."""
    inverses: dict[int, Tensor] = {}
    for width in {stop - start for start, stop in blocks}:
        starts = [start for start, stop in blocks if stop - start == width]
        upper = torch.stack([root_II[start : start + width, start : start + width] for start in starts])
        identity_BB = torch.eye(width, dtype=root_II.dtype, device=root_II.device).expand_as(upper)
        inverse = torch.linalg.solve_triangular(upper, identity_BB, upper=True).contiguous()
        inverses |= dict(zip(starts, inverse.unbind(), strict=True))
    return inverses
