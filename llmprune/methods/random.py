"""Random pruning: the baseline that any method must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.methods import Solution
from llmprune.patterns import ComparisonGroup, Pattern


@dataclass(frozen=True)
class Random:
    """Keep weights drawn uniformly at random; the draw depends on the run's seed and the site's name only."""

    needs: ClassVar[None] = None
    row_wise: ClassVar[bool] = True
    comparison_group: ClassVar[ComparisonGroup] = "layer"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "layer", "block")

    def solve(self, weight_OI: Tensor, statistic: None, pattern: Pattern, generator: torch.Generator) -> Solution:
        score_OI = torch.rand(weight_OI.shape, generator=generator, dtype=torch.float32).to(weight_OI.device)
        return Solution.masked(weight_OI, pattern.keep(score_OI))
