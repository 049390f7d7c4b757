"""SparseSwaps: a mask improved by exchanges of one kept and one removed weight (Zimmer et al., arXiv:2512.10922).

The objective is the output error d H dᵀ of a row, d the weights that its mask removes; survivors keep their values.
Removing u and reviving p changes it by

    (2 w_u c_u + w_u² H_uu) + (w_p² H_pp - 2 w_p c_p) - 2 w_u w_p H_up,   c = d H,

so each exchange is judged exactly, and one that does not lower the error is never made. Both lie in one row, and for
N:M in one group of M, so counts stay what they were.

Shape suffixes: R rows of a chunk, G groups of a row, M inputs of a group (all of a row's if unstructured),
C candidates, O outputs, I inputs.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.methods import Solution, require_at_least
from llmprune.patterns import NM, ComparisonGroup, Pattern
from llmprune.refit import refit
from llmprune.statistics import Gram

_CHUNK_ELEMENTS = 1 << 20
_LEAST_GAIN = 1e-6  # relative to the error of the row: less may be rounding
_REFIT_DAMP = 0.01


@dataclass(frozen=True)
class SparseSwaps:
    """From Wanda's mask, at most `swaps` exchanges a row, then `refit` steps of least squares on the mask.

    Each exchange is the best among the pairs of the `candidates` cheapest removals and revivals of a group.
    """

    swaps: int = 50
    candidates: int = 16
    refit: int = 0
    needs: ClassVar[type[Gram]] = Gram
    row_wise: ClassVar[bool] = False
    comparison_group: ClassVar[ComparisonGroup] = "row"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "layer")

    def __post_init__(self) -> None:
        for name, least in (("swaps", 0), ("candidates", 1), ("refit", 0)):
            require_at_least(self, name, least)

    def solve(self, weight_OI: Tensor, statistic: Gram, pattern: Pattern, generator: torch.Generator) -> Solution:
        hessian_II, dense_OI = statistic.hessian_II, weight_OI.float()
        keep_OI = pattern.keep(dense_OI.abs() * hessian_II.diagonal().sqrt())
        group = pattern.m if isinstance(pattern, NM) else dense_OI.shape[1]
        rows = max(1, _CHUNK_ELEMENTS // dense_OI.shape[1])
        for dense_RI, keep_RI in zip(dense_OI.split(rows), keep_OI.split(rows), strict=True):
            self._improve(dense_RI, keep_RI, hessian_II, group)
        if not self.refit:
            return Solution.masked(weight_OI, keep_OI)
        damped_II = statistic.damped_II(_REFIT_DAMP)
        fitted_OI = refit(dense_OI, damped_II, keep_OI, dense_OI, self.refit).weight_OI
        return Solution(fitted_OI.to(weight_OI.dtype), keep_OI)

    def _improve(self, weight_RI: Tensor, keep_RI: Tensor, hessian_II: Tensor, group: int) -> None:
        """Exchange in place until no row gains."""
        carried_RI = weight_RI.masked_fill(keep_RI, 0) @ hessian_II
        for _ in range(self.swaps):
            gain_R, removed_R, revived_R = self._best_swap(weight_RI, keep_RI, carried_RI, hessian_II, group)
            error_R = (carried_RI * weight_RI.masked_fill(keep_RI, 0)).sum(1)
            row = (gain_R > _LEAST_GAIN * error_R).nonzero().squeeze(1)
            if not len(row):
                return
            out, back = removed_R[row], revived_R[row]
            carried_RI[row] += (
                weight_RI[row, out, None] * hessian_II[out] - weight_RI[row, back, None] * hessian_II[back]
            )
            keep_RI[row, out], keep_RI[row, back] = False, True

    def _best_swap(
        self, weight_RI: Tensor, keep_RI: Tensor, carried_RI: Tensor, hessian_II: Tensor, group: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return each row's largest gain, and the inputs to remove and to revive for it."""
        rows, square_RI = len(weight_RI), weight_RI.square() * hessian_II.diagonal()
        cross_RI = 2 * weight_RI * carried_RI
        removal_RGC, out_RGC = self._cheapest((square_RI + cross_RI).masked_fill(~keep_RI, torch.inf), group)
        revival_RGC, back_RGC = self._cheapest((square_RI - cross_RI).masked_fill(keep_RI, torch.inf), group)
        out_w, back_w = (weight_RI.gather(1, at.flatten(1)).view_as(at) for at in (out_RGC, back_RGC))
        shared_RGCC = hessian_II[out_RGC.unsqueeze(-1), back_RGC.unsqueeze(-2)]
        shared_RGCC = shared_RGCC * out_w.unsqueeze(-1) * back_w.unsqueeze(-2)
        change_RGCC = removal_RGC.unsqueeze(-1) + revival_RGC.unsqueeze(-2) - 2 * shared_RGCC
        change_R, pair_R = change_RGCC.flatten(1).min(1)
        width = out_RGC.shape[-1]
        removed_R = out_RGC.reshape(rows, -1).gather(1, (pair_R // width).unsqueeze(1))
        place_R = pair_R // width**2 * width + pair_R % width
        return -change_R, removed_R.squeeze(1), back_RGC.reshape(rows, -1).gather(1, place_R.unsqueeze(1)).squeeze(1)

    def _cheapest(self, cost_RI: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Return the least costs of every group and the inputs they belong to."""
        cost_RGM = cost_RI.view(len(cost_RI), -1, group)
        least = cost_RGM.topk(min(self.candidates, group), dim=-1, largest=False)
        first_G1 = torch.arange(0, cost_RI.shape[1], group, device=cost_RI.device).unsqueeze(1)
        return least.values, least.indices + first_G1
