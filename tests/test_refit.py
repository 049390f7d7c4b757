"""Least squares on a mask against the normal equations of each row."""

import itertools

import pytest
import torch
from torch import Tensor

import oracle
from llmprune.refit import refit


def problem(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, a Hessian and a mask of 16 rows and 8 columns; the first row keeps nothing."""
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(64, 8, generator=generator) @ (torch.eye(8) + 0.3 * torch.randn(8, 8, generator=generator))
    keep_OI = torch.rand(16, 8, generator=generator) > 0.5
    keep_OI[0] = False
    return torch.randn(16, 8, generator=generator), x_TI.T @ x_TI, keep_OI


def objective(target_OI: Tensor, weight_OI: Tensor, hessian_II: Tensor) -> float:
    change_OI = (target_OI - weight_OI).double()
    return float((change_OI @ hessian_II.double() * change_OI).sum())


@pytest.mark.parametrize("seed", range(4))
def test_refit_reaches_the_normal_equations(seed: int) -> None:
    target_OI, hessian_II, keep_OI = problem(seed)
    expected = [oracle.best_fit(row, hessian_II, keep) for row, keep in zip(target_OI, keep_OI, strict=True)]
    fitted_OI = refit(target_OI, hessian_II, keep_OI, target_OI, 12).weight_OI
    torch.testing.assert_close(fitted_OI, torch.stack(expected), rtol=1e-3, atol=1e-4)
    assert not fitted_OI[~keep_OI].any()


def test_every_step_lowers_the_objective() -> None:
    target_OI, hessian_II, keep_OI = problem(0)
    fits = [refit(target_OI, hessian_II, keep_OI, target_OI, steps) for steps in range(6)]
    errors = [objective(target_OI, fit.weight_OI, hessian_II) for fit in fits]
    for fit in fits:
        rows = zip(target_OI, fit.weight_OI, strict=True)
        expected = [objective(target_I[None], weight_I[None], hessian_II) for target_I, weight_I in rows]
        assert fit.left_O.tolist() == pytest.approx(expected, rel=1e-3)
    assert errors[0] == pytest.approx(objective(target_OI, target_OI * keep_OI, hessian_II))
    assert all(after < before for before, after in itertools.pairwise(errors))


def test_the_arguments_are_only_read() -> None:
    arguments = problem(0)
    before = [argument.clone() for argument in arguments]
    target_OI, hessian_II, keep_OI = arguments
    refit(target_OI, hessian_II, keep_OI, target_OI, 3)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
