"""Least squares on a fixed mask: the surviving weights of a matrix fitted to the dense matrix's outputs.

Shape suffixes: O outputs, I inputs.
"""

from torch import Tensor

from llmprune import kernels

_TINY = 1e-30  # keeps the rows that have converged, where all is zero, from dividing by zero


def refit(target_OI: Tensor, hessian_II: Tensor, keep_OI: Tensor, start_OI: Tensor, steps: int) -> Tensor:
    """Return weights on the mask with a smaller tr((W - target) H (W - target)ᵀ) than those of `start_OI`.

    Conjugate gradients with a Jacobi preconditioner (Saad, Iterative Methods, 2003, algorithm 9.1), one system per
    row, all rows at once; each step costs one product with H. The number of weights of a row bounds the steps that
    the exact solution needs; ten are close to it from a good start.

    Args:
        target_OI: the dense weights, fp32.
        hessian_II: positive definite.
        keep_OI: the mask, which the result obeys.
        start_OI: where to start from; what lies off the mask is ignored.
        steps: of conjugate gradients; 0 returns the start on the mask.
    """
    diagonal_I = hessian_II.diagonal()
    with kernels.tf32(hessian_II.device):
        weight_OI = start_OI * keep_OI
        residual_OI = ((target_OI - weight_OI) @ hessian_II) * keep_OI
        direction_OI = residual_OI / diagonal_I
        descent_O1 = (residual_OI * direction_OI).sum(1, keepdim=True)
        for _ in range(steps):
            image_OI = (direction_OI @ hessian_II).mul_(keep_OI)
            step_O1 = descent_O1 / (direction_OI * image_OI).sum(1, keepdim=True).clamp_min(_TINY)
            weight_OI.addcmul_(step_O1, direction_OI)
            residual_OI.addcmul_(step_O1, image_OI, value=-1)
            conditioned_OI = residual_OI / diagonal_I
            before_O1, descent_O1 = descent_O1, (residual_OI * conditioned_OI).sum(1, keepdim=True)
            direction_OI = conditioned_OI.addcmul_(descent_O1 / before_O1.clamp_min(_TINY), direction_OI)
    return weight_OI
