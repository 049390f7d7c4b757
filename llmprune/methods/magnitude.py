"""Magnitude pruning: remove the weights nearest to zero (Han et al., 2015, arXiv:1506.02626)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.methods import Solution
from llmprune.patterns import ComparisonGroup, Pattern


@dataclass(frozen=True)
class Magnitude:
    """Keep the largest |w|; one threshold per matrix unless another comparison group is asked for."""

    needs: ClassVar[None] = None
    row_wise: ClassVar[bool] = True
    comparison_group: ClassVar[ComparisonGroup] = "layer"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "layer", "block", "model")

    def solve(self, weight_OI: Tensor, statistic: None, pattern: Pattern, generator: torch.Generator) -> Solution:
        return Solution.masked(weight_OI, pattern.keep(weight_OI.abs()))
