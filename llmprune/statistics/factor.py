"""A factor of the Hessian, damped as far as it takes to be positive definite in fp32."""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llmprune.errors import NumericalError

_DAMPING_STEPS = 6  # dampings that are tried, each ten times the one before
_LEAST_DAMPING = 1e-4  # from which the ladder climbs where less was asked for

_log = logging.getLogger(__name__)

FactorKind = Literal["inverse", "root"]


@dataclass(frozen=True)
class Factor:
    """An upper triangular factor of the damped Hessian.

    Of kind `inverse` it is U with H⁻¹ = Uᵀ U, computed as the paper's code does; of kind `root` it is R with
    H = R Rᵀ. They are one factor, U = R⁻¹, but R needs a quarter of the work and no inverse.
    """

    upper_II: Tensor
    dead_I: Tensor
    damp: float
    notes: tuple[str, ...] = field(default=())


def factorize(hessian_II: Tensor, damp: float, kind: FactorKind = "inverse") -> Factor:
    """Factor H with `damp` x mean(diag H) added to its diagonal.

    Inputs that are always zero get a one on the diagonal, before the damping, as in the paper's code. When the
    matrix is not positive definite in fp32 the damping grows tenfold, and a note says so.

    Raises:
        NumericalError: no step of the ladder helps.
    """
    notes: list[str] = []
    ladder = [damp, *(max(damp, _LEAST_DAMPING) * 10**step for step in range(1, _DAMPING_STEPS))]
    for tried, raised in zip(ladder, [*ladder[1:], None], strict=True):
        upper_II = _DECOMPOSITIONS[kind](damped(hessian_II, tried))
        if upper_II is not None:
            return Factor(upper_II, hessian_II.diagonal() == 0, tried, tuple(notes))
        if raised is not None:
            notes.append(f"not positive definite at damping {tried:g}, raised to {raised:g}")
            _log.warning("Gram matrix of %d inputs: %s", len(hessian_II), notes[-1])
    raise NumericalError(
        f"the Gram matrix is not positive definite even at damping {ladder[-1]:g}: its inputs are out of the range of "
        "float32, or it is no Gram matrix; --exclude it, or use --method wanda"
    )


def damped(hessian_II: Tensor, damp: float) -> Tensor:
    """Return a copy of H with `damp` x mean(diag H) on its diagonal, dead inputs as in `factorize`."""
    diagonal_I = _lively_diagonal(hessian_II)
    damped_II = hessian_II.clone()
    damped_II.diagonal().copy_(diagonal_I + damp * diagonal_I.mean())
    return damped_II


def ridge(hessian_II: Tensor, damp: float) -> Tensor:
    """Return what `damped` adds to the diagonal."""
    return damp * _lively_diagonal(hessian_II).mean()


def _lively_diagonal(hessian_II: Tensor) -> Tensor:
    return hessian_II.diagonal().masked_fill(hessian_II.diagonal() == 0, 1)


def _root_factor(damped_II: Tensor) -> Tensor | None:
    """Return R with H = R Rᵀ, or None if H is not positive definite: with J the reversal, J H J = L Lᵀ, R = J L J."""
    lower_II, failed = torch.linalg.cholesky_ex(_reversed(damped_II))
    healthy = not failed.item() and math.isfinite(float(lower_II.diagonal().sum()))
    return _reversed(lower_II) if healthy else None


def _reversed(matrix_II: Tensor) -> Tensor:
    """Return J X J; by one reversal of memory, which is several times as fast as those of both dimensions."""
    if not matrix_II.is_contiguous():
        return _reversed(matrix_II.mT.contiguous()).mT
    return matrix_II.view(-1).flip(0).view_as(matrix_II)


def _inverse_factor(damped_II: Tensor) -> Tensor | None:
    """Return U with H⁻¹ = Uᵀ U, or None if H or its inverse is not positive definite in fp32; overwrites H."""
    lower_II, failed = torch.linalg.cholesky_ex(damped_II)
    if failed.item():
        return None
    torch.cholesky_inverse(lower_II, out=damped_II)
    upper_II, failed = torch.linalg.cholesky_ex(damped_II, upper=True)
    healthy = not failed.item() and math.isfinite(float(upper_II.diagonal().sum()))
    return upper_II if healthy else None


_DECOMPOSITIONS: dict[FactorKind, Callable[[Tensor], Tensor | None]] = {
    "inverse": _inverse_factor,
    "root": _root_factor,
}
