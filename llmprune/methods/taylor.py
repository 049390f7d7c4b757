"""First-order pruning by gradients: keep the weights of which removal changes the loss most (arXiv:1906.10771)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.methods import Solution
from llmprune.patterns import ComparisonGroup, Pattern
from llmprune.statistics import Gradient


@dataclass(frozen=True)
class Taylor:
    """Keep the largest Σ (w · dL/dw)² over the calibration sequences; surviving weights are not changed.

    The importance of eq. 8 of Molchanov et al. (Importance Estimation for Neural Network Pruning, CVPR 2019), for single
    weights, with each sequence as a mini-batch and the next token of its text as label. Its order is that of |w| times
    the l2 norm of gradients over samples, the gradient term of GBLM-Pruner (Das et al., 2023, arXiv:2311.04902).
    """

    needs: ClassVar[type[Gradient]] = Gradient
    row_wise: ClassVar[bool] = False  # its statistic is of the whole matrix
    comparison_group: ClassVar[ComparisonGroup] = "layer"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "layer", "block")

    def solve(self, weight_OI: Tensor, statistic: Gradient, pattern: Pattern, generator: torch.Generator) -> Solution:
        assert statistic.square_OI is not None
        score_OI = weight_OI.float().square().mul_(statistic.square_OI)
        return Solution.masked(weight_OI, pattern.keep(score_OI))
