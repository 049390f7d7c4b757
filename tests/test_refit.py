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


@pytest.mark.parametrize("steps", [3, 10, 100])
@pytest.mark.parametrize(("tokens", "inputs"), [(1, 8), (3, 16), (5, 40), (2, 200)])
def test_steps_after_the_last_that_helps_do_no_harm(tokens: int, inputs: int, steps: int) -> None:
    """Fewer tokens than inputs, undamped: after as many steps as there are tokens all that is left is rounding."""
    generator = torch.Generator().manual_seed(0)
    x_TI, target_OI = (torch.randn(rows, inputs, generator=generator) for rows in (tokens, 16))
    scale_I = x_TI.norm(dim=0)
    hessian_II, target_OI = (x_TI / scale_I).T @ (x_TI / scale_I), target_OI * scale_I
    keep_OI = torch.rand(16, inputs, generator=generator) > 0.5
    fit = refit(target_OI, hessian_II, keep_OI, target_OI, steps)
    before, left = (objective(target_OI, w_OI, hessian_II) for w_OI in (target_OI * keep_OI, fit.weight_OI))
    assert left < before / 2
    assert float(fit.left_O.sum()) == pytest.approx(left, abs=1e-4 * before)
    assert float(fit.weight_OI.abs().max()) < 10 * float(target_OI.abs().max())


@pytest.mark.parametrize(("of_weights", "of_hessian"), [(-40, 0), (-20, -40), (0, -60), (20, 20)])
def test_the_scale_of_weights_and_inputs_changes_no_bit(of_weights: int, of_hessian: int) -> None:
    target_OI, hessian_II, keep_OI = problem(0)
    scaled_OI = target_OI * 2.0**of_weights
    fit = refit(target_OI, hessian_II, keep_OI, target_OI, 3)
    scaled = refit(scaled_OI, hessian_II * 2.0**of_hessian, keep_OI, scaled_OI, 3)
    assert torch.equal(scaled.weight_OI, fit.weight_OI * 2.0**of_weights)
    assert torch.equal(scaled.left_O, fit.left_O * 2.0 ** (2 * of_weights + of_hessian))


def test_the_arguments_are_only_read() -> None:
    arguments = problem(0)
    before = [argument.clone() for argument in arguments]
    target_OI, hessian_II, keep_OI = arguments
    refit(target_OI, hessian_II, keep_OI, target_OI, 3)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
