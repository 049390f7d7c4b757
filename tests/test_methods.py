"""The contract of every method, found by its file's name, and each method against the paper it comes from."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
from llmprune import methods, patterns
from llmprune.errors import PatternError, RecipeError
from llmprune.methods import Method, Solution
from llmprune.methods.sparsegpt import SparseGPT
from llmprune.patterns import NM, Count, Pattern, Unstructured
from llmprune.solving import checked_solution, prune_matrix
from llmprune.statistics import ColumnNorm, Gram

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
GROUPED = [(name, group) for name in methods.names() for group in methods.get(name).comparison_groups]
OUTPUTS, INPUTS, DEAD = 12, 256, [3, 130, 131]


def each_pattern(method: Method) -> list[Pattern]:
    unstructured = [Unstructured(s, group) for s in (0.3, 0.5) for group in method.comparison_groups]
    return [*unstructured, NM(2, 4), NM(1, 4), NM(4, 8), NM(64, 128)]


CASES = [(name, pattern) for name in methods.names() for pattern in each_pattern(methods.get(name))]
each_case = pytest.mark.parametrize(("name", "pattern"), CASES, ids=[f"{name}-{pattern!r}" for name, pattern in CASES])


def weights(dtype: torch.dtype = torch.float32, outputs: int = OUTPUTS, inputs: int = INPUTS, seed: int = 0) -> Tensor:
    return torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(seed)).to(dtype)


def correlated(tokens: int, inputs: int, seed: int = 1) -> Tensor:
    """Inputs that are correlated and of different scales, as activations are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(inputs) + 0.3 * torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    scale = torch.rand(inputs, generator=generator) + 0.1
    x_TI: Tensor = torch.randn(tokens, inputs, generator=generator) @ mixing * scale
    return x_TI


def statistic_for(method: Method, x_TI: Tensor) -> Any:
    if method.needs is None:
        return None
    statistic = method.needs(x_TI.shape[1], CPU)
    statistic.add(x_TI, 2)
    return statistic


def solved(method: Method, weight_OI: Tensor, x_TI: Tensor, pattern: Pattern, seed: int = 0) -> Solution:
    return checked_solution(
        "a site", method, weight_OI, statistic_for(method, x_TI), pattern, torch.Generator().manual_seed(seed)
    )


def inputs_with_dead_ones() -> Tensor:
    x_TI = correlated(400, INPUTS)
    x_TI[:, DEAD] = 0
    return x_TI


def gram_of(x_TI: Tensor) -> Gram:
    statistic = Gram(x_TI.shape[1], CPU)
    statistic.add(x_TI, 1)
    return statistic


@pytest.mark.parametrize("dtype", DTYPES)
@each_case
def test_a_solution_keeps_the_pattern_the_dtype_and_the_input(name: str, pattern: Pattern, dtype: torch.dtype) -> None:
    method, weight_OI, x_TI = methods.get(name), weights(dtype), inputs_with_dead_ones()
    before_OI = weight_OI.clone()
    solution = solved(method, weight_OI, x_TI, pattern)
    pattern.check(solution.keep_OI)
    assert torch.equal(weight_OI, before_OI)
    assert (solution.weight_OI.dtype, solution.weight_OI.shape) == (dtype, weight_OI.shape)
    assert solution.weight_OI.device == solution.keep_OI.device == weight_OI.device
    assert solution.keep_OI.dtype == torch.bool
    assert torch.isfinite(solution.weight_OI).all()
    removed = solution.weight_OI[~solution.keep_OI]
    assert not removed.any() and not removed.signbit().any()


@each_case
def test_a_solution_is_reproducible(name: str, pattern: Pattern) -> None:
    first, second = (solved(methods.get(name), weights(), correlated(400, INPUTS), pattern) for _ in range(2))
    assert torch.equal(first.weight_OI, second.weight_OI) and torch.equal(first.keep_OI, second.keep_OI)


@pytest.mark.parametrize(("name", "pattern"), [case for case in CASES if case[0] != "random"])
def test_the_order_of_the_outputs_does_not_matter(name: str, pattern: Pattern) -> None:
    order = torch.randperm(OUTPUTS, generator=torch.Generator().manual_seed(5))
    method, weight_OI, x_TI = methods.get(name), weights(), correlated(400, INPUTS)
    straight, shuffled = solved(method, weight_OI, x_TI, pattern), solved(method, weight_OI[order], x_TI, pattern)
    assert torch.equal(straight.keep_OI[order], shuffled.keep_OI)
    torch.testing.assert_close(straight.weight_OI[order], shuffled.weight_OI, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", methods.names())
def test_no_zero_has_a_sign(name: str) -> None:
    weight_OI = weights()
    weight_OI[:, ::3] = -0.0
    solution = solved(methods.get(name), weight_OI, correlated(400, INPUTS), Unstructured(0.3))
    assert not solution.weight_OI[solution.weight_OI == 0].signbit().any()


@pytest.mark.parametrize("name", methods.names())
def test_a_stored_transpose_is_solved_like_the_matrix(name: str) -> None:
    method, weight_OI, x_TI = methods.get(name), weights(), correlated(400, INPUTS)
    straight = solved(method, weight_OI, x_TI, NM(2, 4))
    viewed = solved(method, weight_OI.T.contiguous().T, x_TI, NM(2, 4))
    assert torch.equal(straight.keep_OI, viewed.keep_OI)
    torch.testing.assert_close(straight.weight_OI, viewed.weight_OI)


@pytest.mark.parametrize(("name", "group"), GROUPED)
def test_tied_weights_still_give_the_exact_pattern(name: str, group: patterns.ComparisonGroup) -> None:
    pattern = Unstructured(0.5, group)
    pattern.check(solved(methods.get(name), torch.ones(6, 200), torch.ones(20, 200), pattern).keep_OI)


def test_magnitude_keeps_the_largest() -> None:
    weight_OI = weights()
    removed = oracle.remove_lowest(weight_OI.abs().flatten().tolist(), OUTPUTS * INPUTS // 2)
    solution = solved(methods.get("magnitude"), weight_OI, correlated(8, INPUTS), Unstructured(0.5, "layer"))
    assert solution.keep_OI.flatten().tolist() == [not gone for gone in removed]
    assert torch.equal(solution.weight_OI, weight_OI * solution.keep_OI)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.61])
def test_wanda_scores_weights_by_the_norms_of_their_inputs(sparsity: float, dtype: torch.dtype) -> None:
    weight_OI, x_TI = weights(dtype), correlated(100, INPUTS)
    norms = [float(column.double().square().sum().sqrt()) for column in x_TI.T]
    solution = solved(methods.get("wanda"), weight_OI, x_TI, Unstructured(sparsity, "row"))
    for row, keep in zip(weight_OI.tolist(), solution.keep_OI.tolist(), strict=True):
        score = [abs(w) * norm for w, norm in zip(row, norms, strict=True)]
        assert keep == [not gone for gone in oracle.remove_lowest(score, int(INPUTS * sparsity))]
    assert torch.equal(solution.weight_OI, weight_OI * solution.keep_OI)


def test_random_depends_on_the_seed_and_the_site_only() -> None:
    method, weight_OI, pattern = methods.get("random"), weights(), Unstructured(0.5)

    def keep(site: str, seed: int, weight_OI: Tensor = weight_OI) -> Tensor:
        pruned_OI = weight_OI.clone()
        prune_matrix(site, method, pruned_OI, None, pattern, seed)
        return pruned_OI != 0

    assert torch.equal(keep("a", 0), keep("a", 0, weights(seed=9)))
    assert not torch.equal(keep("a", 0), keep("b", 0)) and not torch.equal(keep("a", 0), keep("a", 1))


@pytest.mark.parametrize("inputs", [100, 128, 200, 256, 300])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_sparsegpt_is_the_papers_algorithm(inputs: int, sparsity: float) -> None:
    weight_OI, x_TI = weights(inputs=inputs), correlated(3 * inputs, inputs)
    expected_OI = oracle.sparsegpt(weight_OI, gram_of(x_TI).hessian_II, sparsity)
    solution = solved(methods.get("sparsegpt"), weight_OI, x_TI, Unstructured(sparsity, "block"))
    assert torch.equal(solution.weight_OI != 0, expected_OI != 0)
    torch.testing.assert_close(solution.weight_OI, expected_OI, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("n", "m", "inputs"),
    [(2, 4, 256), (2, 4, 300), (1, 4, 100), (4, 8, 256), (3, 5, 300), (8, 24, 240), (16, 32, 256), (64, 128, 384)],
)
def test_sparsegpt_nm_is_the_papers_algorithm(n: int, m: int, inputs: int) -> None:
    weight_OI, x_TI = weights(inputs=inputs), correlated(3 * inputs, inputs)
    expected_OI = oracle.sparsegpt(weight_OI, gram_of(x_TI).hessian_II, n=n, m=m, block=128 // m * m)
    solution = solved(methods.get("sparsegpt"), weight_OI, x_TI, NM(n, m))
    assert torch.equal(solution.weight_OI != 0, expected_OI != 0)
    torch.testing.assert_close(solution.weight_OI, expected_OI, rtol=1e-3, atol=1e-4)


def test_sparsegpt_zeroes_the_weights_of_dead_inputs() -> None:
    weight_OI, x_TI = weights(), inputs_with_dead_ones()
    expected_OI = oracle.sparsegpt(weight_OI, gram_of(x_TI).hessian_II, 0.5)
    solution = solved(methods.get("sparsegpt"), weight_OI, x_TI, Unstructured(0.5, "block"))
    assert not solution.weight_OI[:, DEAD].any()
    torch.testing.assert_close(solution.weight_OI, expected_OI, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("damp", "block_size"), [(0.1, 128), (0.01, 64), (0.01, 100), (0.5, 32)])
def test_sparsegpt_follows_its_options(damp: float, block_size: int) -> None:
    weight_OI, x_TI = weights(), correlated(600, INPUTS)
    expected_OI = oracle.sparsegpt(weight_OI, gram_of(x_TI).hessian_II, 0.5, damp=damp, block=block_size)
    solution = solved(SparseGPT(damp, block_size), weight_OI, x_TI, Unstructured(0.5, "block"))
    torch.testing.assert_close(solution.weight_OI, expected_OI, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("remove", [1, 2, 4, 6])
@pytest.mark.parametrize("seed", range(4))
def test_sparsegpt_lies_between_the_best_removal_and_magnitudes(seed: int, remove: int) -> None:
    weight_OI, x_TI = weights(outputs=16, inputs=8, seed=seed), correlated(64, 8, seed)
    statistic, pattern = gram_of(x_TI), Unstructured(remove / 8, "row")
    errors = {}
    for name, method in (("sparsegpt", SparseGPT(damp=1e-6)), ("magnitude", methods.get("magnitude"))):
        pruned_OI = solved(method, weight_OI, x_TI, pattern).weight_OI
        errors[name] = 2 * statistic.energy(weight_OI - pruned_OI)  # the Hessian is twice the Gram
    best = sum(oracle.best_removal(row.double(), statistic.hessian_II.double(), remove) for row in weight_OI)
    assert best * 0.999 <= errors["sparsegpt"] <= errors["magnitude"] * 1.001


def test_best_removal_is_the_best_of_all_refitted_subsets() -> None:
    weight_I, x_TI = weights(outputs=1, inputs=6)[0].double(), correlated(40, 6).double()
    refitted = []
    for kept in itertools.combinations(range(6), 3):
        solution = torch.linalg.lstsq(x_TI[:, list(kept)], x_TI @ weight_I).solution
        refitted.append(float((x_TI @ weight_I - x_TI[:, list(kept)] @ solution).square().sum()))
    assert oracle.best_removal(weight_I, x_TI.T @ x_TI, 3) == pytest.approx(min(refitted))


def test_a_note_tells_that_the_damping_was_raised() -> None:
    class Indefinite(Gram):
        @property
        def hessian_II(self) -> Tensor:
            return torch.diag(torch.tensor([10.0, 10.0, 10.0, -0.5]))

    method = SparseGPT(damp=0.01)
    solution = checked_solution("a site", method, weights(inputs=4), Indefinite(4, CPU), NM(2, 4), torch.Generator())
    assert solution.notes == ("not positive definite at damping 0.01, raised to 0.1",)


def test_sparsegpt_cannot_follow_a_count() -> None:
    with pytest.raises(PatternError, match="sparsegpt chooses its masks block by block"):
        solved(methods.get("sparsegpt"), weights(), correlated(300, INPUTS), Count(5, OUTPUTS * INPUTS))


def test_the_files_are_the_methods() -> None:
    assert methods.names() == [
        "admm",
        "magnitude",
        "magnitude_l2",
        "obd",
        "random",
        "ria",
        "sparsegpt",
        "sparseswaps",
        "wanda",
    ]
    assert [methods.name_of(methods.get(name)) for name in methods.names()] == methods.names()


@pytest.mark.parametrize("name", methods.names())
def test_a_methods_declarations_agree(name: str) -> None:
    method = methods.get(name)
    assert method.comparison_group in method.comparison_groups
    assert set(method.comparison_groups) <= set(patterns.COMPARISON_GROUPS)
    assert method.needs in (None, ColumnNorm, Gram)


@pytest.mark.parametrize(("name", "near"), [("wand", "wanda"), ("SparseGTP", "sparsegpt"), ("magnitud", "magnitude")])
def test_an_unknown_method_gets_the_nearest_name(name: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown method '{name}': did you mean '{near}'"):
        methods.get(name)


def test_a_method_unlike_any_gets_them_all() -> None:
    with pytest.raises(RecipeError, match="known: admm, magnitude, .*, sparsegpt, sparseswaps, wanda"):
        methods.get("xyz")


def test_options_are_converted() -> None:
    found = methods.get("sparsegpt", {"damp": "0.1", "block_size": "64"})
    assert found == SparseGPT(damp=0.1, block_size=64)
    assert methods.get("sparsegpt", {"damp": 1, "block_size": 64.0}) == replace(SparseGPT(), damp=1.0, block_size=64)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sparsegpt", {"dampp": 1}, "no option 'dampp': did you mean 'damp'"),
        ("wanda", {"damp": 1}, "no option 'damp': it takes none"),
        ("sparsegpt", {"damp": "much"}, "damp='much' is not a float"),
        ("sparsegpt", {"damp": None}, "damp=None is not a float"),
        ("sparsegpt", {"damp": float("nan")}, "damp=nan is not a float"),
        ("sparsegpt", {"damp": -0.1}, "damp must be a number of at least 0, not -0.1"),
        ("sparsegpt", {"damp": "nan"}, "damp must be a number of at least 0, not nan"),
        ("sparsegpt", {"block_size": 64.5}, "block_size=64.5 is not a int"),
        ("sparsegpt", {"block_size": float("inf")}, "block_size=inf is not a int"),
        ("sparsegpt", {"block_size": 0}, "block_size must be at least 1, not 0"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods.get(name, options)
    assert message in str(error.value)
