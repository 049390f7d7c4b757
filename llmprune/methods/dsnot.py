"""DSnoT, dynamic sparse no training (Zhang et al., ICLR 2024, arXiv:2310.08915): a mask refined without gradients.

Wanda's mask is improved row by row. With Δ the expected output that a row has lost, E[Δ] = Σ w E[x] over what is
removed, each cycle revives one weight and removes another:

    revive the removed weight with the largest sign(E[Δ]) · w E[x] / Var[x]                            (eq. 4)
    remove, of those kept with E[Δ] · w E[x] < 0, the one with the least |w| · ‖x‖₂                    (eq. 5)

so that both bring E[Δ] nearer to zero. A row rests once |E[Δ]| has fallen below a threshold. Two things differ from the
paper: the threshold is relative to what the row had lost at first, as an absolute one means something else in every
model; and a cycle that would not lower |E[Δ]| is not made. For N:M both weights are of one group of M.

Shape suffixes: R rows, O outputs, I inputs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.methods import Solution, require_at_least, require_from_zero
from llmprune.patterns import NM, ComparisonGroup, Pattern
from llmprune.statistics import ColumnMoments


@dataclass(frozen=True)
class DSnoT:
    """At most `cycles` exchanges a row, until less than `threshold` of the expected loss is left."""

    cycles: int = 50
    threshold: float = 0.1
    needs: ClassVar[type[ColumnMoments]] = ColumnMoments
    row_wise: ClassVar[bool] = True
    comparison_group: ClassVar[ComparisonGroup] = "row"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "layer")

    def __post_init__(self) -> None:
        require_at_least(self, "cycles", 0)
        require_from_zero(self, "threshold")

    def solve(
        self, weight_OI: Tensor, statistic: ColumnMoments, pattern: Pattern, generator: torch.Generator
    ) -> Solution:
        score_OI = weight_OI.abs().float().mul_(statistic.norm_I)
        keep_OI = pattern.keep(score_OI)
        group = pattern.m if isinstance(pattern, NM) else weight_OI.shape[1]
        self._refine(weight_OI.float() * statistic.mean_I, statistic.variance_I, score_OI, keep_OI, group)
        return Solution.masked(weight_OI, keep_OI)

    def _refine(self, share_OI: Tensor, variance_I: Tensor, score_OI: Tensor, keep_OI: Tensor, group: int) -> None:
        """Exchange in place; `share` is what each weight adds to the expected output."""
        lost_O = share_OI.masked_fill(keep_OI, 0).sum(1)
        enough_O = self.threshold * lost_O.abs()
        gain_OI = share_OI / variance_I.clamp_min(torch.finfo(variance_I.dtype).tiny)
        row = lost_O.abs().gt(enough_O).nonzero().squeeze(1)
        for _ in range(self.cycles):
            if not len(row):
                return
            sign_R1 = lost_O[row].sign().unsqueeze(1)
            back_R = (sign_R1 * gain_OI[row]).masked_fill_(keep_OI[row], -torch.inf).argmax(1)
            wrong_RI = ~keep_OI[row] | (sign_R1 * share_OI[row] >= 0) | _outside(back_R, group, share_OI.shape[1])
            cost_R, out_R = score_OI[row].masked_fill_(wrong_RI, torch.inf).min(1)
            after_R = lost_O[row] - share_OI[row, back_R] + share_OI[row, out_R]
            better_R = cost_R.isfinite() & ~keep_OI[row, back_R] & (after_R.abs() < lost_O[row].abs())
            row, back_R, out_R, after_R = row[better_R], back_R[better_R], out_R[better_R], after_R[better_R]
            keep_OI[row, back_R], keep_OI[row, out_R], lost_O[row] = True, False, after_R
            row = row[after_R.abs() > enough_O[row]]


def _outside(chosen_R: Tensor, group: int, inputs: int) -> Tensor:
    """Return which inputs are not in the group of the one chosen in each row."""
    group_I = torch.arange(inputs, device=chosen_R.device) // group
    return group_I.unsqueeze(0) != (chosen_R // group).unsqueeze(1)
