"""`llmprune.solve`: one matrix in, one pruned matrix out, from whatever the user has of its inputs."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import llmprune
from llmprune import methods, solving
from llmprune.errors import LlmpruneError, NumericalError, PatternError, RecipeError
from llmprune.methods import Solution
from llmprune.methods.wanda import Wanda
from llmprune.patterns import Count, as_row_levels
from llmprune.recipe import Recipe
from llmprune.solving import checked_solution, energies, prune_matrix, seeded
from llmprune.statistics import ColumnNorm, CrossGram, FactorKind, Gradient, Gram
from llmprune.statistics.factor import Factor, factorize

CPU = torch.device("cpu")
METHODS = llmprune.methods.names()


def matrix(outputs: int = 8, inputs: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed))


def told(method: str) -> Tensor:
    """Return what a method may be told beside the weights: the gradient of the loss, or inputs."""
    return matrix(seed=1) if llmprune.methods.get(method).needs is Gradient else matrix(64, seed=1)


def fed(kind: type[ColumnNorm] | type[Gram], x_TI: Tensor) -> ColumnNorm | Gram:
    statistic = kind(x_TI.shape[1], CPU)
    statistic.add(x_TI, 1)
    return statistic


@pytest.mark.parametrize(("method", "kind"), [("wanda", ColumnNorm), ("sparsegpt", Gram)])
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_inputs_and_the_statistic_of_them_give_the_same(method: str, kind: Any, pattern: str) -> None:
    weight, inputs = matrix(), matrix(64, seed=1)
    from_inputs = llmprune.solve(weight, inputs, method=method, pattern=pattern)
    from_statistic = llmprune.solve(weight, fed(kind, inputs), method=method, pattern=pattern)
    assert torch.equal(from_inputs.weight_OI, from_statistic.weight_OI)
    assert torch.equal(from_inputs.keep_OI, from_statistic.keep_OI)


@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_methods_that_look_at_weights_only_need_no_inputs(method: str) -> None:
    weight = matrix()
    assert int((llmprune.solve(weight, method=method).weight_OI == 0).sum()) == weight.numel() // 2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_any_floating_dtype_of_weights_and_inputs(method: str, dtype: torch.dtype) -> None:
    solution = llmprune.solve(matrix().to(dtype), told(method).to(dtype), method=method)
    assert solution.weight_OI.dtype == dtype


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_is_solved_outside_of_autograd(method: str) -> None:
    weight = torch.nn.Parameter(matrix())
    solution = llmprune.solve(weight, told(method).requires_grad_(), method=method)
    assert not solution.weight_OI.requires_grad
    assert torch.equal(weight, matrix())


def test_the_seed_and_the_options_are_heard() -> None:
    weight = matrix()
    first, second = (llmprune.solve(weight, method="random", seed=seed).keep_OI for seed in (0, 1))
    assert not torch.equal(first, second)
    per_row = llmprune.solve(weight, method="magnitude", comparison_group="row").keep_OI
    assert per_row.sum(1).tolist() == [16] * 8
    damped = [llmprune.solve(weight, matrix(64, seed=1), method_options={"damp": d}).weight_OI for d in (0.01, 1)]
    assert not torch.equal(*damped)


def test_a_method_object_will_do() -> None:
    by_name = llmprune.solve(matrix(), matrix(64, seed=1), method="wanda")
    by_object = llmprune.solve(matrix(), matrix(64, seed=1), method=Wanda())
    assert torch.equal(by_name.keep_OI, by_object.keep_OI)


@pytest.mark.parametrize(
    ("weight", "statistic", "options", "kind", "message"),
    [
        (matrix(), None, {"method": "wanda"}, RecipeError, "Wanda needs calibration inputs or a ColumnNorm"),
        (matrix(), None, {}, RecipeError, "SparseGPT needs calibration inputs or a Gram"),
        (matrix(), fed(ColumnNorm, matrix()), {}, RecipeError, "SparseGPT needs calibration inputs or a Gram"),
        (matrix(), fed(Gram, matrix()), {"method": "dsnot"}, RecipeError, "calibration inputs or a ColumnMoments"),
        (matrix(), matrix(9, 31), {}, RecipeError, "must be inputs [tokens, 32] or a Gram matrix, not [9, 31]"),
        (matrix(), matrix(1)[0], {}, RecipeError, "must be inputs [tokens, 32] or a Gram matrix, not [32]"),
        (matrix(), matrix(1)[0], {"method": "dsnot"}, RecipeError, "must be inputs [tokens, 32], not [32]"),
        (matrix(), fed(Gram, matrix(9, 16)), {}, RecipeError, "of 16 inputs, the matrix has 32"),
        (matrix(), fed(ColumnNorm, matrix(9, 1)), {"method": "wanda"}, RecipeError, "of 1 inputs, the matrix has 32"),
        (
            matrix().tolist(),
            matrix(9, 32),
            {},
            PatternError,
            "a matrix must be a torch.Tensor [outputs, inputs], not a list",
        ),
        (matrix()[0], matrix(), {}, PatternError, "a matrix [outputs, inputs] is needed, not a tensor [32]"),
        (matrix()[:, :0], matrix(9, 0), {}, PatternError, "a matrix [outputs, inputs] is needed, not a tensor [8, 0]"),
        (matrix(), matrix()[:0], {}, RecipeError, "the statistic has seen no inputs"),
        (matrix(), matrix()[:0], {"method": "wanda"}, RecipeError, "the statistic has seen no inputs"),
        (matrix(), Gram(32, torch.device("cpu")), {}, RecipeError, "the statistic has seen no inputs"),
        (matrix(), matrix().int(), {"method": "wanda"}, RecipeError, "floating point numbers, not of torch.int32"),
        (matrix(), matrix().int(), {}, RecipeError, "floating point numbers, not of torch.int32"),
        (matrix(), matrix(), {"tune_epochs": 2}, RecipeError, "tune_epochs means nothing for a single matrix"),
        (
            matrix(),
            matrix(),
            {"overrides": {"*": {"pattern": "2:4"}}},
            RecipeError,
            "overrides means nothing for a single matrix",
        ),
        (
            matrix().to(torch.float8_e4m3fn),
            matrix(),
            {},
            PatternError,
            "of 16 bits or more are needed, not a matrix of torch.float8",
        ),
        (
            torch.ones(4, 8, dtype=torch.int64),
            None,
            {"method": "magnitude"},
            PatternError,
            "not a matrix of torch.int64",
        ),
        (
            matrix(8, 30),
            matrix(9, 30),
            {"pattern": "2:4"},
            PatternError,
            "the matrix has 30 inputs, not divisible by 4",
        ),
        (matrix().fill_(float("nan")), matrix(), {}, NumericalError, "the matrix holds NaN or infinity"),
        (matrix(), matrix().fill_(float("inf")), {}, NumericalError, "the matrix: its calibration inputs hold NaN"),
        (matrix(), matrix(), {"metod": "wanda"}, RecipeError, "unknown option 'metod': did you mean 'method'"),
    ],
)
def test_what_cannot_be_solved_is_refused(
    weight: Tensor, statistic: Any, options: dict[str, Any], kind: type[LlmpruneError], message: str
) -> None:
    with pytest.raises(kind) as error:
        llmprune.solve(weight, statistic, **options)
    assert message in str(error.value)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 22])
def test_the_relative_error_is_that_of_the_outputs(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(solving, "ROW_CHUNK", chunk)
    weight, pruned, inputs = matrix(), llmprune.solve(matrix(), method="magnitude").weight_OI, matrix(64, seed=1)
    truth = float(((weight - pruned) @ inputs.T).square().sum() / (weight @ inputs.T).square().sum())
    change, whole = energies(weight, pruned, fed(Gram, inputs))
    assert change / whole == pytest.approx(truth, rel=1e-5)
    plain = float((weight - pruned).square().sum() / weight.square().sum())
    change, whole = energies(weight, pruned, None)
    assert change / whole == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(("method", "statistic"), [("wanda", ColumnNorm), ("magnitude", None), ("sparsegpt", Gram)])
@pytest.mark.parametrize("pattern", ["50%", "2:4"])
def test_a_matrix_pruned_in_chunks_of_rows_is_that_pruned_whole(
    monkeypatch: pytest.MonkeyPatch, method: str, statistic: Any, pattern: str
) -> None:
    recipe = Recipe.of({"method": method, "pattern": pattern})
    fed_with = fed(statistic, matrix(64, seed=1)) if statistic else None
    results = []
    for chunk in (1 << 22, 3 * 32):
        monkeypatch.setattr(solving, "ROW_CHUNK", chunk)
        weight = matrix()
        outcome = prune_matrix("a site", recipe.solver(), weight, fed_with, recipe.target(), 0)
        results.append((weight, outcome))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1].zeros == results[1][1].zeros == weight.numel() // 2
    assert results[0][1].error == pytest.approx(results[1][1].error, rel=1e-5)


def test_a_matrix_of_zeros_has_no_error() -> None:
    recipe = Recipe.of({"method": "magnitude"})
    assert prune_matrix("a site", recipe.solver(), torch.zeros(2, 2), None, recipe.target(), 0).error == 0


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_inputs_and_their_gram_matrix_give_one_result(method: str) -> None:
    inputs = matrix(64, seed=1)
    by_inputs = llmprune.solve(matrix(), inputs, method=method)
    by_gram = llmprune.solve(matrix(), inputs.T @ inputs, method=method)
    assert torch.equal(by_inputs.keep_OI, by_gram.keep_OI)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("scale", [2.0**-40, 2.0**40], ids=["small", "large"])
def test_as_many_tokens_as_inputs_are_no_gram_matrix_whatever_their_scale(scale: float, method: str) -> None:
    inputs = matrix(32, seed=1)
    expected = llmprune.solve(matrix(), fed(Gram, inputs), method=method)
    assert torch.equal(llmprune.solve(matrix(), inputs * scale, method=method).keep_OI, expected.keep_OI)
    assert llmprune.solve(matrix(8, 1), torch.tensor([[-scale]]), method=method).keep_OI.shape == (8, 1)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_gram_matrix_may_be_rounded_otherwise_above_its_diagonal_than_below(method: str) -> None:
    inputs = matrix(512, seed=1)
    gram = inputs.T @ inputs
    gram[0, 1:] += 1e-6 * gram[0, 0]
    by_inputs, by_gram = (llmprune.solve(matrix(), told, method=method) for told in (inputs, gram))
    assert torch.equal(by_inputs.keep_OI, by_gram.keep_OI)


def test_norms_will_do_for_wanda_only() -> None:
    inputs = matrix(64, seed=1)
    by_norms = llmprune.solve(matrix(), inputs.norm(dim=0), method="wanda")
    assert torch.equal(by_norms.keep_OI, llmprune.solve(matrix(), inputs, method="wanda").keep_OI)
    with pytest.raises(RecipeError, match="or a Gram matrix"):
        llmprune.solve(matrix(), inputs.norm(dim=0), method="sparsegpt")


@pytest.mark.parametrize("method", ["admm", "magnitude", "obd", "sparsegpt", "wanda"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_solved_as_large_as_their_errors_count(method: str, dtype: torch.dtype) -> None:
    """As scaled rows are by themselves; weights that are only kept stay what they are, to the bit."""
    generator = torch.Generator().manual_seed(0)
    weight_OI = (0.02 * torch.randn(8, 32, generator=generator, dtype=torch.float64)).to(dtype)
    x_TI = torch.randn(200, 32, generator=generator) @ torch.randn(32, 32, generator=generator)
    fed = (ColumnNorm if method == "wanda" else Gram)(32, x_TI.device)
    fed.add(x_TI, 1)
    group: Any = "block" if method == "sparsegpt" else "layer"
    pattern = Count(120, 256, group, as_row_levels(torch.tensor([1 / 9, 1, 1, 1, 1, 1.3, 3, 7]).log2()))
    scale_O1 = pattern.row_scales.unsqueeze(1)
    torch.testing.assert_close(scale_O1[:, 0], torch.tensor([1 / 8, 1, 1, 1, 1, 1.3, 3, 7]), rtol=0.045, atol=0)

    def solved(weight: Tensor, pattern: Count, dtype: torch.dtype) -> Solution:
        return checked_solution("it", methods.get(method), weight, fed, pattern, seeded(0, "it"), dtype)

    found = solved(weight_OI, pattern, dtype)
    wide_OI = weight_OI if dtype == torch.float64 else weight_OI.float()
    by_hand = solved(wide_OI * scale_O1, replace(pattern, row_levels=b""), wide_OI.dtype)
    assert torch.equal(found.keep_OI, by_hand.keep_OI)
    torch.testing.assert_close(found.weight_OI, (by_hand.weight_OI / scale_O1).to(dtype))
    kept_O = found.keep_OI.sum(1)
    assert kept_O[0] < kept_O[1:5].min() and kept_O[7] > kept_O[1:5].max()
    if method in ("magnitude", "obd", "wanda"):
        assert torch.equal(found.weight_OI, weight_OI * found.keep_OI)
    if found.change_O is not None:
        assert isinstance(fed, Gram)
        change_O = fed.energy_O(weight_OI.float() - found.weight_OI.float())
        torch.testing.assert_close(found.change_O, change_O, rtol=1e-3, atol=1e-5)


def test_rows_that_are_alike_have_no_levels() -> None:
    assert as_row_levels(torch.tensor([1.0, 1.0, 1.02]).log2()) == b""
    assert as_row_levels(torch.tensor([0.5, 1.0, 2.0]).log2()) == bytes([120, 128, 136])


def test_one_factor_serves_a_dense_target_and_sparsegpt(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []

    def counted(hessian_II: Tensor, damp: float, kind: FactorKind) -> Factor:
        asked.append(damp)
        return factorize(hessian_II, damp, kind)

    monkeypatch.setattr("llmprune.statistics.gram.factorize", counted)
    statistic, x_TI = CrossGram(32, CPU), matrix(64, seed=1)
    statistic.add(x_TI, 1, x_TI + matrix(64, seed=2))
    method = methods.get("sparsegpt", {"arithmetic": "fast", "sampling_damp": 0.1})
    prune_matrix("a site", method, matrix(), statistic, Recipe.of({"method": method}).target(), 0, dense_target=0.5)
    assert asked == [pytest.approx(0.01 + 0.1 * 32 / 64)]
