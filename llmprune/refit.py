"""Least squares on a fixed mask: the surviving weights of a matrix fitted to the dense matrix's outputs.

Shape suffixes: O outputs, I inputs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmprune import kernels
from llmprune.patterns import as_numbers

_LEAST_CURVATURE = 1e-6  # of a direction, relative to the diagonal's; below it is rounding, and a step would be endless
_TINY = torch.finfo(torch.float32).tiny  # keeps the rows that have converged, where all is zero, from dividing by zero


@dataclass(frozen=True)
class Fit:
    """Weights on a mask, and what is left of each row's objective: of the start's less what each step took from it."""

    weight_OI: Tensor
    left_O: Tensor


def refit(target_OI: Tensor, hessian_II: Tensor, keep_OI: Tensor, start_OI: Tensor, steps: int) -> Fit:
    """Fit weights on the mask, to a smaller tr((W - target) H (W - target)ᵀ) than those of `start_OI` have.

    Conjugate gradients with a Jacobi preconditioner (Saad, Iterative Methods, 2003, algorithm 9.1), one system per
    row, all rows at once; each step costs one product with H. The number of weights of a row bounds the steps that
    the exact solution needs; ten are close to it from a good start. A row takes no step along which H is nothing but
    rounding, as it is where fewer tokens than inputs were seen, once the row has converged.

    Args:
        target_OI: the dense weights, fp32.
        hessian_II: positive semidefinite, with a diagonal above zero.
        keep_OI: the mask, which the result obeys.
        start_OI: where to start from; what lies off the mask is ignored.
        steps: of conjugate gradients; 0 returns the start on the mask.
    """
    diagonal_I, keeps_OI = hessian_II.diagonal(), as_numbers(keep_OI)
    with kernels.tf32(hessian_II.device):
        weight_OI = start_OI * keeps_OI
        missing_OI = target_OI - weight_OI
        gradient_OI = missing_OI @ hessian_II
        left_O = (missing_OI * gradient_OI).sum(1)
        residual_OI = gradient_OI * keeps_OI
        del missing_OI, gradient_OI  # before more is made
        direction_OI = residual_OI / diagonal_I
        descent_O1 = (residual_OI * direction_OI).sum(1, keepdim=True)
        size_O1 = descent_O1  # direction diag(H) direction
        for _ in range(steps):
            image_OI = (direction_OI @ hessian_II).mul_(keeps_OI)
            step_O1 = _steps(descent_O1, (direction_OI * image_OI).sum(1, keepdim=True), size_O1)
            left_O -= (step_O1 * descent_O1).squeeze(1)
            weight_OI.addcmul_(step_O1, direction_OI)
            residual_OI.addcmul_(step_O1, image_OI, value=-1)
            del image_OI
            conditioned_OI = residual_OI / diagonal_I
            before_O1, descent_O1 = descent_O1, (residual_OI * conditioned_OI).sum(1, keepdim=True)
            share_O1 = descent_O1 / before_O1.clamp_min(_TINY)
            direction_OI = conditioned_OI.addcmul_(share_O1, direction_OI)
            size_O1 = descent_O1 + share_O1.square() * size_O1  # the two parts are orthogonal
    return Fit(weight_OI, left_O.clamp_min_(0))


def _steps(descent_O1: Tensor, curvature_O1: Tensor, size_O1: Tensor) -> Tensor:
    """Return how far to go along each row's direction: to the least objective there, nowhere where that cannot be told."""
    return (descent_O1 / curvature_O1).masked_fill_(curvature_O1 <= _LEAST_CURVATURE * size_O1, 0)
