"""ADMM search of mask and weights together (Meng et al., ALPS, NeurIPS 2024, arXiv:2406.07831).

Minimises tr((W - W₀) H (W - W₀)ᵀ) over the matrices W of the pattern (eq. 1, damped). W is split into a dense X, which
follows the objective, and a sparse Z, which obeys the pattern; a penalty rho pulls them together (eq. 4):

    X ← W₀ + rho (Z - U - W₀) (H + rho)⁻¹,   Z ← largest of X + U,   U ← X + U - Z

(X is the paper's (W₀ H + rho (Z - U)) (H + rho)⁻¹, but here the product is as small as what changes, and bears rounding.)
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
from llmprune.methods import Solution, require_arithmetic, require_at_least, require_from_zero
from llmprune.patterns import ComparisonGroup, Pattern, as_numbers
from llmprune.refit import refit
from llmprune.statistics import Gram

_ROWS_FOR_INVERSE = {torch.float32: 2.0, torch.bfloat16: 1.0}  # for each input, from which on an inverse pays on a CPU
_GPU_ROWS_FOR_INVERSE = 0.5  # the same on a GPU, which multiplies much faster than it solves
_KEPT_BYTES = 1 << 26  # for what the sites that read one input divide by
_GPU_KEPT_BYTES = 2 << 30  # the same on a GPU


@dataclass(frozen=True)
class ADMM:
    """`stages` values of rho from `first_rho` to `last_rho`, `iterations` in all, then `refit` steps on the mask.

    `fast` arithmetic searches with products of bfloat16 in all stages but the last, where those are faster: other masks,
    which are as good. `damp`, and `sampling_damp` for few tokens, are as in `Gram.damping`.
    """

    damp: float = 0.01
    iterations: int = 60
    stages: int = 10
    first_rho: float = 0.03
    last_rho: float = 1.0
    refit: int = 10
    arithmetic: str = "paper"
    sampling_damp: float = 0.0
    needs: ClassVar[type[Gram]] = Gram
    row_wise: ClassVar[bool] = False
    comparison_group: ClassVar[ComparisonGroup] = "layer"
    comparison_groups: ClassVar[tuple[ComparisonGroup, ...]] = ("row", "layer", "block")

    def __post_init__(self) -> None:
        require_from_zero(self, "damp")
        require_from_zero(self, "sampling_damp")
        if not 1 <= self.stages <= self.iterations:
            asked = f"{self.stages} stages of {self.iterations} iterations"
            raise RecipeError(f"method 'admm': there must be at least 1 stage, and an iteration for each, not {asked}")
        if not 0 < self.first_rho <= self.last_rho < math.inf:
            raise RecipeError(f"method 'admm': rho must rise from above 0, not {self.first_rho} to {self.last_rho}")
        require_at_least(self, "refit", 0)
        require_arithmetic(self)

    def solve(self, weight_OI: Tensor, statistic: Gram, pattern: Pattern, generator: torch.Generator) -> Solution:
        damp = statistic.damping(self.damp, self.sampling_damp)
        hessian_II = statistic.damped_II(damp)
        scale_I = hessian_II.diagonal().sqrt()
        hessian_II.div_(scale_I).div_(scale_I.unsqueeze(1))
        target_OI = (weight_OI.float() * scale_I).masked_fill_(statistic.hessian_II.diagonal() == 0, 0)
        kept = statistic if self._keeps(hessian_II) else None
        sparse_OI, keep_OI = self._search(target_OI, hessian_II, pattern, kept)
        fit = refit(target_OI, hessian_II, keep_OI, sparse_OI, self.refit)
        square_O = ((target_OI - fit.weight_OI) / scale_I).square().sum(1)
        change_O = statistic.undamped(fit.left_O, square_O, damp)
        return Solution((fit.weight_OI / scale_I).to(weight_OI.dtype), keep_OI, change_O=change_O)

    def _search(
        self, target_OI: Tensor, hessian_II: Tensor, pattern: Pattern, kept: Gram | None
    ) -> tuple[Tensor, Tensor]:
        """Return the sparse matrix that the iterations end at, and its mask; `kept` has what was divided by before."""
        keep_OI = pattern.keep(target_OI.abs())
        sparse_OI, dual_OI = target_OI * as_numbers(keep_OI), torch.zeros_like(target_OI)
        before = self._rho(0)
        for stage in range(self.stages):
            rho, products = self._rho(stage), self._products(stage, hessian_II.device)
            inverse = _pays_to_invert(hessian_II, self._share(stage) * len(target_OI), products)
            division = partial(_division, hessian_II, rho, inverse, products)
            key = self.damp, self.sampling_damp, rho, inverse, products
            divided = kept.once(key, division) if kept else division()
            dual_OI.mul_(before / rho)  # scaled by 1/rho
            for _ in range(self._share(stage)):
                split_OI = dual_OI.add_(target_OI)
                split_OI.add_(divided(sparse_OI - split_OI))  # X + U
                keep_OI = pattern.keep(split_OI.abs())
                sparse_OI = split_OI * as_numbers(keep_OI)
                dual_OI = split_OI.sub_(sparse_OI)
            del divided  # before the next one takes its memory
            before = rho
        return sparse_OI, keep_OI

    def _keeps(self, hessian_II: Tensor) -> bool:
        """Say whether what all stages divide by is kept, for the next site that reads the same input."""
        most = _GPU_KEPT_BYTES if hessian_II.device.type == "cuda" else _KEPT_BYTES
        return self.stages * hessian_II.nbytes <= most

    def _products(self, stage: int, device: torch.device) -> torch.dtype:
        """Return what is multiplied in; in the last stage fp32, as the weights' fit starts from what that ends at."""
        rough = self.arithmetic == "fast" and stage < self.stages - 1 and kernels.multiplies_bfloat16(device)
        return torch.bfloat16 if rough else torch.float32

    def _rho(self, stage: int) -> float:
        return self.first_rho * math.pow(self.last_rho / self.first_rho, stage / max(self.stages - 1, 1))

    def _share(self, stage: int) -> int:
        """Split the iterations over the stages, all of them used."""
        return self.iterations * (stage + 1) // self.stages - self.iterations * stage // self.stages


def _pays_to_invert(hessian_II: Tensor, rows: int, products: torch.dtype) -> bool:
    """Say whether so many rows are divided by a matrix faster by means of its inverse."""
    per_input = _GPU_ROWS_FOR_INVERSE if hessian_II.device.type == "cuda" else _ROWS_FOR_INVERSE[products]
    return rows >= per_input * len(hessian_II)


def _division(hessian_II: Tensor, rho: float, inverse: bool, products: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return X -> rho X (H + rho)⁻¹, by solving in fp32 or by means of an inverse."""
    lower_II = _lower(hessian_II, rho)
    if not inverse:
        return partial(_divided, lower_II)
    return partial(_multiplied, _inverse(lower_II).to(products))


def _inverse(lower_II: Tensor) -> Tensor:
    """Return (L Lᵀ)⁻¹; on a GPU by a product of its own, in the precision in which it will be multiplied anyway."""
    if lower_II.device.type != "cuda":
        return torch.cholesky_inverse(lower_II)
    identity_II = torch.eye(len(lower_II), dtype=lower_II.dtype, device=lower_II.device)
    inverse_II: Tensor = torch.linalg.solve_triangular(lower_II, identity_II, upper=False)
    with kernels.tf32(lower_II.device):
        return inverse_II.T @ inverse_II


def _multiplied(inverse_II: Tensor, x_OI: Tensor) -> Tensor:
    with kernels.tf32(x_OI.device):
        return x_OI.to(inverse_II.dtype) @ inverse_II


def _lower(hessian_II: Tensor, rho: float) -> Tensor:
    """Return L with L Lᵀ = H / rho + 1."""
    regularised_II = hessian_II / rho
    regularised_II.diagonal().add_(1)
    lower_II: Tensor
    lower_II, failed = torch.linalg.cholesky_ex(regularised_II)
    if failed.item():
        raise NumericalError(
            f"admm: the Hessian is not positive definite at rho {rho:g}: raise damp, or use more calibration"
        )
    return lower_II


def _divided(lower_II: Tensor, x_OI: Tensor) -> Tensor:
    """Return X (L Lᵀ)⁻¹."""
    half_OI = torch.linalg.solve_triangular(lower_II.mT, x_OI, upper=True, left=False)
    whole_OI: Tensor = torch.linalg.solve_triangular(lower_II, half_OI, upper=False, left=False)
    return whole_OI
