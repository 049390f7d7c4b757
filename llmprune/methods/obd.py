"""Optimal brain damage on a layer's outputs (LeCun, Denker & Solla, NIPS 1989)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.methods import Solution
from llmprune.patterns import ComparisonGroup, Pattern
from llmprune.statistics import ColumnNorm


@dataclass(frozen=True)
class OBD:
    """Keep the largest w² · ‖x‖² / 2: second order, the Hessian of the layer's output error taken as diagonal.

    Its order is Wanda's; the difference is the comparison over the whole matrix, as in the paper.
    """

    needs: ClassVar[type[ColumnNorm]] = ColumnNorm
    row_wise: ClassVar[bool] = True
    comparison_group: ClassVar[ComparisonGroup] = "layer"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "layer", "block")

    def solve(self, weight_OI: Tensor, statistic: ColumnNorm, pattern: Pattern, generator: torch.Generator) -> Solution:
        score_OI = weight_OI.float().mul(statistic.norm_I).square_().div_(2)
        return Solution.masked(weight_OI, pattern.keep(score_OI))
