"""L2-normalised magnitude: remove the weights that matter least to their own output (after Lee et al., ICLR 2021)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from llmprune.methods import Solution
from llmprune.patterns import ComparisonGroup, Pattern


@dataclass(frozen=True)
class MagnitudeL2:
    """Keep the largest |w| / ‖row‖₂, so that outputs of unlike scale lose alike; within a row it is magnitude.

    The norm puts weights of unlike scale on one footing, as the score of LAMP does between layers
    (arXiv:2010.07611); here it does so between the rows of a matrix.
    """

    needs: ClassVar[None] = None
    row_wise: ClassVar[bool] = True
    comparison_group: ClassVar[ComparisonGroup] = "layer"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "layer", "block")

    def solve(self, weight_OI: Tensor, statistic: None, pattern: Pattern, generator: torch.Generator) -> Solution:
        size_OI = weight_OI.float().abs()
        norm_O1 = torch.linalg.vector_norm(size_OI, dim=1, keepdim=True)
        return Solution.masked(weight_OI, pattern.keep(size_OI / norm_O1.clamp_min(torch.finfo(size_OI.dtype).tiny)))
