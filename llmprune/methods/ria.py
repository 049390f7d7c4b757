"""RIA, relative importance and activations (Zhang et al., Plug-and-Play, ICLR 2024, openreview.net/forum?id=Tr0lPx9woF).

The paper's full title is Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.methods import Solution, require_from_zero
from llmprune.patterns import ComparisonGroup, Pattern
from llmprune.statistics import ColumnNorm


@dataclass(frozen=True)
class RIA:
    """Keep the largest (|w| / sum of its row's + |w| / sum of its column's magnitudes) · ‖x‖₂^power; 0.5 is the paper's."""

    power: float = 0.5
    needs: ClassVar[type[ColumnNorm]] = ColumnNorm
    row_wise: ClassVar[bool] = False
    comparison_group: ClassVar[ComparisonGroup] = "row"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "layer", "block")

    def __post_init__(self) -> None:
        require_from_zero(self, "power")

    def solve(self, weight_OI: Tensor, statistic: ColumnNorm, pattern: Pattern, generator: torch.Generator) -> Solution:
        score_OI = relative_importance(weight_OI.abs().float()).mul_(statistic.norm_I.pow(self.power))
        return Solution.masked(weight_OI, pattern.keep(score_OI))


def relative_importance(size_OI: Tensor) -> Tensor:
    """Return what share each |w| has in its row plus what share it has in its column; 0 where all are zero."""
    tiny = torch.finfo(size_OI.dtype).tiny
    share_OI: Tensor = size_OI / size_OI.sum(1, keepdim=True).clamp_min(tiny)
    return share_OI.add_(size_OI / size_OI.sum(0, keepdim=True).clamp_min(tiny))
