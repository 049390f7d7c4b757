"""ADMM search of mask and weights together (Meng et al., ALPS, NeurIPS 2024, arXiv:2406.07831).

Minimises tr((W - W₀) H (W - W₀)ᵀ) over the matrices W of the pattern (eq. 1, damped). W is split into a dense X, which
follows the objective, and a sparse Z, which obeys the pattern; a penalty rho pulls them together (eq. 4):

    X ← (W₀ H + rho (Z - U)) (H + rho)⁻¹,   Z ← largest of X + U,   U ← X + U - Z

In the end the weights are fitted on the mask that is found (eq. 6, algorithm 2). Inputs are scaled to a Hessian of unit
diagonal first, so that the projection on the pattern compares what removals cost.

Two things differ from the paper: rho climbs a fixed geometric ladder, so each rung takes one Cholesky factorisation
and no eigendecomposition is needed; and the start is the largest scaled weights.

Shape suffixes: O outputs, I inputs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from llmprune import kernels
from llmprune.errors import NumericalError, RecipeError
from llmprune.methods import Solution, require_from_zero
from llmprune.patterns import ComparisonGroup, Pattern
from llmprune.refit import refit
from llmprune.statistics import Gram

_ROWS_FOR_INVERSE = 2  # for each input, from which on an inverse pays on a CPU
_GPU_ROWS_FOR_INVERSE = 0.5  # the same on a GPU, which multiplies much faster than it solves
_KEPT_BYTES = 1 << 26  # for what the sites that read one input divide by
_GPU_KEPT_BYTES = 2 << 30  # the same on a GPU


@dataclass(frozen=True)
class ADMM:
    """`stages` values of rho from `first_rho` to `last_rho`, `iterations` in all, then `refit` steps on the mask."""

    damp: float = 0.01
    iterations: int = 60
    stages: int = 10
    first_rho: float = 0.03
    last_rho: float = 1.0
    refit: int = 10
    needs: ClassVar[type[Gram]] = Gram
    row_wise: ClassVar[bool] = False
    comparison_group: ClassVar[ComparisonGroup] = "layer"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "layer", "block")

    def __post_init__(self) -> None:
        require_from_zero(self, "damp")
        if not 1 <= self.stages <= self.iterations:
            asked = f"{self.stages} stages of {self.iterations} iterations"
            raise RecipeError(f"method 'admm': there must be at least 1 stage, and an iteration for each, not {asked}")
        if not 0 < self.first_rho <= self.last_rho < math.inf:
            raise RecipeError(f"method 'admm': rho must rise from above 0, not {self.first_rho} to {self.last_rho}")
        if self.refit < 0:
            raise RecipeError(f"method 'admm': refit must be at least 0, not {self.refit}")

    def solve(self, weight_OI: Tensor, statistic: Gram, pattern: Pattern, generator: torch.Generator) -> Solution:
        hessian_II = statistic.damped_II(self.damp)
        scale_I = hessian_II.diagonal().sqrt()
        hessian_II.div_(scale_I).div_(scale_I.unsqueeze(1))
        target_OI = (weight_OI.float() * scale_I).masked_fill_(statistic.hessian_II.diagonal() == 0, 0)
        kept = statistic if self._keeps(hessian_II) else None
        sparse_OI, keep_OI = self._search(target_OI, hessian_II, pattern, kept)
        fitted_OI = refit(target_OI, hessian_II, keep_OI, sparse_OI, self.refit)
        return Solution((fitted_OI / scale_I).to(weight_OI.dtype), keep_OI)

    def _search(
        self, target_OI: Tensor, hessian_II: Tensor, pattern: Pattern, kept: Gram | None
    ) -> tuple[Tensor, Tensor]:
        """Return the sparse matrix that the iterations end at, and its mask; `kept` has what was divided by before."""
        with kernels.tf32(hessian_II.device):
            pull_OI = target_OI @ hessian_II
        keep_OI = pattern.keep(target_OI.abs())
        sparse_OI, dual_OI = target_OI * keep_OI, torch.zeros_like(target_OI)
        before = self._rho(0)
        for stage in range(self.stages):
            rho = self._rho(stage)
            inverse = _pays_to_invert(hessian_II, self._share(stage) * len(target_OI))
            division = partial(_division, hessian_II, rho, inverse)
            divided = kept.once((self.damp, rho, inverse), division) if kept else division()
            dual_OI.mul_(before / rho)  # scaled by 1/rho
            for _ in range(self._share(stage)):
                drawn_OI = torch.add(pull_OI, sparse_OI - dual_OI, alpha=rho)
                dual_OI.add_(divided(drawn_OI))
                keep_OI = pattern.keep(dual_OI.abs())
                sparse_OI = dual_OI * keep_OI
                dual_OI.sub_(sparse_OI)
            del divided  # before the next one takes its memory
            before = rho
        return sparse_OI, keep_OI

    def _keeps(self, hessian_II: Tensor) -> bool:
        """Say whether what all stages divide by is kept, for the next site that reads the same input."""
        most = _GPU_KEPT_BYTES if hessian_II.device.type == "cuda" else _KEPT_BYTES
        return self.stages * hessian_II.nbytes <= most

    def _rho(self, stage: int) -> float:
        return self.first_rho * math.pow(self.last_rho / self.first_rho, stage / max(self.stages - 1, 1))

    def _share(self, stage: int) -> int:
        """Split the iterations over the stages, all of them used."""
        return self.iterations * (stage + 1) // self.stages - self.iterations * stage // self.stages


def _pays_to_invert(hessian_II: Tensor, rows: int) -> bool:
    """Say whether so many rows are divided by a matrix faster by means of its inverse."""
    per_input = _GPU_ROWS_FOR_INVERSE if hessian_II.device.type == "cuda" else _ROWS_FOR_INVERSE
    return rows >= per_input * len(hessian_II)


def _division(hessian_II: Tensor, rho: float, inverse: bool) -> Callable[[Tensor], Tensor]:
    """Return X -> X (H + rho)⁻¹."""
    lower_II = _lower(hessian_II, rho)
    return partial(_multiplied, inverse_II=_inverse(lower_II)) if inverse else partial(_divided, lower_II=lower_II)


def _inverse(lower_II: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹; on a GPU by a product of its own, in the precision in which it will be multiplied anyway."""
    if lower_II.device.type != "cuda":
        return torch.cholesky_inverse(lower_II)
    identity_II = torch.eye(len(lower_II), dtype=lower_II.dtype, device=lower_II.device)
    inverse_II: Tensor = torch.linalg.solve_triangular(lower_II, identity_II, upper=False)
    with kernels.tf32(lower_II.device):
        return inverse_II.T @ inverse_II


def _multiplied(x_OI: Tensor, inverse_II: Tensor) -> Tensor:
    with kernels.tf32(x_OI.device):
        return x_OI @ inverse_II


def _lower(hessian_II: Tensor, rho: float) -> Tensor:
    """Return L with L Lᵀ = H + rho."""
    regularised_II = hessian_II.clone()
    regularised_II.diagonal().add_(rho)
    lower_II: Tensor
    lower_II, failed = torch.linalg.cholesky_ex(regularised_II)
    if failed.item():
        raise NumericalError(
            f"admm: the Hessian is not positive definite at rho {rho:g}: raise damp, or use more calibration"
        )
    return lower_II


def _divided(x_OI: Tensor, lower_II: Tensor) -> Tensor:
    """Return X (L Lᵀ)⁻¹."""
    half_OI = torch.linalg.solve_triangular(lower_II.mT, x_OI, upper=True, left=False)
    whole_OI: Tensor = torch.linalg.solve_triangular(lower_II, half_OI, upper=False, left=False)
    return whole_OI
