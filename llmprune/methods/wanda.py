"""Wanda (Sun et al., ICLR 2024, arXiv:2306.11695, eq. 1): keep the largest |w| · ‖x‖₂, compared per output row."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.methods import Solution
from llmprune.patterns import ComparisonGroup, Pattern
from llmprune.statistics import ColumnNorm


@dataclass(frozen=True)
class Wanda:
    """Score in fp32, per row `int(inputs * sparsity)` removed; surviving weights are not changed."""

    needs: ClassVar[type[ColumnNorm]] = ColumnNorm
    row_wise: ClassVar[bool] = True
    comparison_group: ClassVar[ComparisonGroup] = "row"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "layer", "block")

    def solve(self, weight_OI: Tensor, statistic: ColumnNorm, pattern: Pattern, generator: torch.Generator) -> Solution:
        score_OI = weight_OI.abs().float().mul_(statistic.norm_I)
        return Solution.masked(weight_OI, pattern.keep(score_OI))
