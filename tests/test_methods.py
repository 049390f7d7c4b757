"""The contract of every method, found by its file's name, and each method against the paper it comes from."""

import gc
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import oracle
from llmprune import methods, patterns
from llmprune.errors import NumericalError, RecipeError
from llmprune.methods import ARITHMETICS, Method, Solution, sparsegpt
from llmprune.methods.admm import ADMM
from llmprune.methods.sparsegpt import SparseGPT
from llmprune.methods.thanos import Thanos
from llmprune.model.live import LiveBytes
from llmprune.patterns import NM, Count, Pattern, Unstructured
from llmprune.presets import in_full
from llmprune.solving import checked_solution, prune_matrix
from llmprune.statistics import ColumnMoments, ColumnNorm, Gradient, Gram
from llmprune.statistics.factor import Factor

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


def statistic_for(method: Method, x_TI: Tensor, weight_OI: Tensor) -> Any:
    if method.needs is None:
        return None
    if issubclass(method.needs, Gradient):
        return gradient_of(weight_OI, x_TI)
    statistic = method.needs(x_TI.shape[1], CPU)
    statistic.add(x_TI, 2)
    return statistic


def gradient_of(weight_OI: Tensor, x_TI: Tensor) -> Gradient:
    """The gradient of a loss that is a quarter of the outputs' fourth powers, each half of the tokens a sequence."""
    outputs, inputs = weight_OI.shape
    statistic = Gradient(outputs, inputs, CPU)
    for half in x_TI.chunk(2):
        statistic.add(half, (half @ weight_OI.float().T) ** 3)
        statistic.close_sequence()
    return statistic


def solved(
    method: Method, weight_OI: Tensor, x_TI: Tensor, pattern: Pattern, seed: int = 0, statistic: Any = None
) -> Solution:
    return checked_solution(
        "a site",
        method,
        weight_OI,
        statistic or statistic_for(method, x_TI, weight_OI),
        pattern,
        torch.Generator().manual_seed(seed),
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


@pytest.fixture
def uncollected() -> Iterator[None]:
    """Circles of references are not broken up meanwhile: in a run that may happen only matrices later."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("method", [*map(methods.get, methods.names()), SparseGPT(arithmetic="fast")], ids=repr)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NM(2, 4)], ids=repr)
def test_what_a_method_works_on_is_freed_with_its_solution(
    method: Method, pattern: Unstructured | NM, uncollected: None
) -> None:
    weight_OI, pattern = weights(), patterns.in_group(pattern, method.comparison_group)
    statistic = statistic_for(method, correlated(400, INPUTS), weight_OI)
    with LiveBytes() as live:
        checked_solution("a site", method, weight_OI, statistic, pattern, torch.Generator().manual_seed(0))
        if isinstance(statistic, Gram):
            statistic.forget_factors()
    assert live.peak > live.now == 0


@pytest.mark.parametrize(
    ("method", "matrices"),
    [
        (ADMM(iterations=4, stages=2, refit=3), 7.4),
        (ADMM(iterations=4, stages=2, refit=3, arithmetic="fast"), 7.4),
        (SparseGPT(), 2.6),
        (SparseGPT(arithmetic="fast"), 4.6),
    ],
    ids=repr,
)
def test_a_solver_holds_so_many_matrices_beside_the_weights(method: Method, matrices: float) -> None:
    """In fp32; the Gram matrix is small here."""
    weight_OI, statistic = weights(outputs=4096, inputs=128), gram_of(correlated(400, 128))
    with LiveBytes() as live:
        method.solve(weight_OI, statistic, NM(2, 4), torch.Generator())
    assert live.peak <= matrices * weight_OI.nbytes


@pytest.mark.parametrize("iterations", [4, 256], ids=["triangles", "inverse"])
def test_admm_holds_one_factor_at_a_time(iterations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the Hessian: what is factored and its factor, or that and the inverse; where they are too large to keep."""
    monkeypatch.setattr("llmprune.methods.admm._KEPT_BYTES", 0)
    statistic = gram_of(correlated(400, INPUTS))
    with LiveBytes() as live:
        ADMM(iterations=iterations, stages=2).solve(
            weights(outputs=4), statistic, Unstructured(0.5), torch.Generator().manual_seed(0)
        )
    assert live.peak == pytest.approx(3 * Gram.nbytes(INPUTS), rel=0.15)


@pytest.mark.parametrize(("rows", "factored"), [(20, 4), (160, 2)])
def test_matrices_that_read_one_input_share_admms_factors_and_nothing_else(rows: int, factored: int) -> None:
    """Neither does a matrix that is divided by triangles take the inverse of another, as ranks may solve one each."""
    method, statistic = ADMM(iterations=8, stages=2), gram_of(correlated(400, INPUTS))
    several = [weights(outputs=160), weights(outputs=rows, seed=1)]

    def solutions(grams: Sequence[Gram]) -> list[Tensor]:
        return [
            method.solve(weight_OI, gram, Unstructured(0.5), torch.Generator().manual_seed(0)).weight_OI
            for weight_OI, gram in zip(several, grams, strict=True)
        ]

    with mock.patch.object(torch.linalg, "cholesky_ex", wraps=torch.linalg.cholesky_ex) as cholesky:
        together = solutions([statistic, statistic])
    assert cholesky.call_count == factored
    for one, alone in zip(together, solutions([gram_of(correlated(400, INPUTS)) for _ in several]), strict=True):
        assert torch.equal(one, alone)


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


@pytest.mark.parametrize("method", [SparseGPT(), SparseGPT(arithmetic="fast"), ADMM(iterations=10, refit=3)], ids=repr)
def test_few_tokens_add_to_the_damping(method: SparseGPT | ADMM) -> None:
    weight_OI, pattern = weights(), Unstructured(0.5)
    few_TI, single_TI = correlated(4 * INPUTS, INPUTS), correlated(1, INPUTS)
    for x_TI, damp in ((few_TI, 0.01 + 0.2 / 4), (single_TI, 0.01 + 0.2)):
        found = solved(replace(method, sampling_damp=0.2), weight_OI, x_TI, pattern)
        assert torch.equal(found.weight_OI, solved(replace(method, damp=damp), weight_OI, x_TI, pattern).weight_OI)
    assert not torch.equal(found.weight_OI, solved(method, weight_OI, single_TI, pattern).weight_OI)


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


def errors_of(method: Method, weight_OI: Tensor, statistic: Gram, x_TI: Tensor, pattern: Pattern) -> Tensor:
    """Return the output error of every row, in units of the Hessian."""
    change_OI = (weight_OI - solved(method, weight_OI, x_TI, pattern).weight_OI).double()
    return (change_OI @ statistic.hessian_II.double() * change_OI).sum(1)


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.3, "block"), Unstructured(0.5, "row"), NM(2, 4), NM(8, 24)], ids=repr
)
@pytest.mark.parametrize("inputs", [240, 408])
def test_fast_arithmetic_is_the_papers_algorithm(inputs: int, pattern: Pattern) -> None:
    weight_OI, x_TI = weights(inputs=inputs), correlated(3 * inputs, inputs)
    x_TI[:, 5] = 0
    paper, fast = (solved(SparseGPT(arithmetic=a), weight_OI, x_TI, pattern) for a in ("paper", "fast"))
    assert torch.equal(paper.keep_OI, fast.keep_OI)
    assert not fast.weight_OI[:, 5].any()
    torch.testing.assert_close(paper.weight_OI, fast.weight_OI, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("damp", [1e-4, 0.01, 1.0])
@pytest.mark.parametrize("pattern", [Unstructured(0.5, "block"), NM(2, 4)], ids=repr)
@pytest.mark.parametrize("method", [SparseGPT(arithmetic="fast"), ADMM(iterations=10, refit=3)], ids=repr)
def test_a_method_knows_what_its_change_of_each_row_costs(
    method: SparseGPT | ADMM, pattern: Pattern, damp: float
) -> None:
    weight_OI, x_TI = weights(inputs=300), correlated(900, 300)
    x_TI[:, 5] = 0
    method, statistic, generator = replace(method, damp=damp), gram_of(x_TI), torch.Generator()
    found = checked_solution("a site", method, weight_OI, statistic, pattern, generator)
    assert found.change_O is not None
    expected = [statistic.energy(change_I[None]) for change_I in weight_OI - found.weight_OI]
    assert found.change_O.tolist() == pytest.approx(expected, rel=1e-3)
    assert float(found.change_O.sum()) == pytest.approx(statistic.energy(weight_OI - found.weight_OI), rel=1e-4)
    rounded = checked_solution("a site", method, weight_OI.bfloat16(), statistic, pattern, generator)
    assert rounded.change_O is None


def test_what_is_made_of_damping_is_not_taken_for_what_a_change_costs() -> None:
    """One input thousands of times the others: damping by its size is nearly all that a change of the others costs."""
    weight_OI, x_TI = weights(inputs=64), correlated(300, 64)
    x_TI[:, 0] *= 1e5
    for method in (SparseGPT(arithmetic="fast"), ADMM(iterations=10, refit=3)):
        assert method.solve(weight_OI, gram_of(x_TI), NM(2, 4), torch.Generator()).change_O is None


@pytest.mark.parametrize("rows", [20, 300], ids=["solved", "multiplied"])
@pytest.mark.parametrize("decades", [0, 4])
@pytest.mark.parametrize("preset", ["balanced", "balanced, N:M", "best"])
def test_admm_in_fast_arithmetic_ends_where_it_does_in_the_papers(preset: str, decades: int, rows: int) -> None:
    pattern, options = NM(2, 4) if "N:M" in preset else Unstructured(0.5), in_full()[preset]["method_options"]
    weight_OI, x_TI = weights(outputs=rows, inputs=240), correlated(1000, 240)
    x_TI = x_TI * torch.logspace(0, -decades, 240)
    x_TI = x_TI @ torch.linalg.qr(torch.randn(240, 240, generator=torch.Generator().manual_seed(1))).Q
    statistic, found = gram_of(x_TI), []
    with mock.patch("llmprune.kernels.multiplies_bfloat16", return_value=True):
        for arithmetic in ARITHMETICS:
            method = methods.get("admm", {**options, "arithmetic": arithmetic})
            found.append(solved(method, weight_OI, x_TI, pattern))
    errors = [statistic.energy(weight_OI - solution.weight_OI) for solution in found]
    assert errors[1] == pytest.approx(errors[0], rel=0.015)
    assert torch.equal(found[0].keep_OI, found[1].keep_OI) == (rows == 20)  # few rows are not multiplied by an inverse


def test_both_arithmetics_have_a_factor() -> None:
    assert set(sparsegpt._FACTORS) == set(ARITHMETICS)


@pytest.mark.parametrize("remove", [2, 4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_admm_is_near_the_best_of_all_refitted_subsets(seed: int, remove: int) -> None:
    weight_OI, x_TI = weights(outputs=16, inputs=8, seed=seed), correlated(64, 8, seed)
    statistic, pattern = gram_of(x_TI), Unstructured(remove / 8, "row")
    found = float(errors_of(methods.get("admm", {"damp": 1e-6}), weight_OI, gram_of(x_TI), x_TI, pattern).sum())
    greedy = float(errors_of(SparseGPT(damp=1e-6), weight_OI, statistic, x_TI, pattern).sum())
    best = sum(oracle.best_removal(row.double(), statistic.hessian_II.double(), remove) for row in weight_OI)
    assert best * 0.999 <= found <= min(best * 1.25, greedy * 1.001)


@pytest.mark.parametrize("pattern", [Unstructured(0.6, "layer"), Unstructured(0.5, "row"), NM(2, 4)], ids=repr)
@pytest.mark.parametrize("seed", range(4))
def test_admm_makes_the_papers_iterations(seed: int, pattern: Pattern) -> None:
    weight_OI, x_TI = weights(outputs=16, inputs=8, seed=seed), correlated(64, 8, seed) @ correlated(8, 8, 2)
    options = {"iterations": 12, "stages": 3, "first_rho": 0.01, "last_rho": 1, "refit": 16}
    expected_OI = oracle.admm(weight_OI, gram_of(x_TI).hessian_II, pattern.keep, [0.01, 0.1, 1.0], 4)
    solution = solved(methods.get("admm", options), weight_OI, x_TI, pattern)
    assert torch.equal(solution.weight_OI != 0, expected_OI != 0)
    torch.testing.assert_close(solution.weight_OI.double(), expected_OI, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", [Unstructured(0.6, "layer"), Unstructured(0.6, "row"), NM(2, 4)], ids=repr)
def test_admm_beats_sparsegpt_on_correlated_inputs(pattern: Pattern) -> None:
    weight_OI, x_TI = weights(), correlated(400, INPUTS) @ correlated(INPUTS, INPUTS, 2)
    statistic = gram_of(x_TI)
    group = replace(pattern, group="block") if isinstance(pattern, Unstructured) else pattern
    greedy = errors_of(methods.get("sparsegpt"), weight_OI, statistic, x_TI, group).sum()
    assert errors_of(methods.get("admm"), weight_OI, statistic, x_TI, pattern).sum() < 0.95 * greedy


@pytest.mark.parametrize(("name", "group"), GROUPED)
@pytest.mark.parametrize("removed", [0, 1000, 1535, OUTPUTS * INPUTS])
def test_every_method_follows_a_count(name: str, group: patterns.ComparisonGroup, removed: int) -> None:
    pattern = Count(removed, OUTPUTS * INPUTS, group)
    pattern.check(solved(methods.get(name), weights(), inputs_with_dead_ones(), pattern).keep_OI)


def test_admm_zeroes_the_weights_of_dead_inputs() -> None:
    solution = solved(methods.get("admm"), weights(), inputs_with_dead_ones(), Unstructured(0.5, "layer"))
    assert not solution.weight_OI[:, DEAD].any()


def test_admm_refuses_an_indefinite_hessian() -> None:
    statistic = Gram.from_matrix(torch.tensor([[1.0, 3.0], [3.0, 1.0]]))
    with pytest.raises(NumericalError, match=r"admm: the Hessian is not positive definite at rho 0\.03"):
        methods.get("admm").solve(weights(inputs=2), statistic, Unstructured(0.5, "row"), torch.Generator())


@pytest.mark.parametrize(("pattern", "group"), [(Unstructured(0.5, "row"), 8), (NM(2, 4), 4)], ids=repr)
@pytest.mark.parametrize("seed", range(3))
def test_sparseswaps_ends_where_no_exchange_helps(seed: int, pattern: Pattern, group: int) -> None:
    weight_OI, x_TI = weights(outputs=16, inputs=8, seed=seed), correlated(64, 8, seed)
    hessian_II = gram_of(x_TI).hessian_II
    wanda = errors_of(methods.get("wanda"), weight_OI, gram_of(x_TI), x_TI, pattern)
    swapped = errors_of(methods.get("sparseswaps"), weight_OI, gram_of(x_TI), x_TI, pattern)
    solution = solved(methods.get("sparseswaps"), weight_OI, x_TI, pattern)
    assert (swapped <= wanda * 1.0001).all() and swapped.sum() < wanda.sum()
    assert torch.equal(solution.weight_OI, weight_OI * solution.keep_OI)
    for row, keep, found in zip(weight_OI.double(), solution.keep_OI, swapped, strict=True):
        assert not oracle.can_swap(row, hessian_II.double(), keep, group)
        if group == 8:
            assert float(found) >= oracle.best_mask_error(row, hessian_II.double(), 4) * 0.999


def test_sparseswaps_keeps_every_rows_count() -> None:
    pattern, x_TI = Unstructured(0.5, "layer"), correlated(400, INPUTS)
    before, after = (
        solved(methods.get("sparseswaps", {"swaps": swaps}), weights(), x_TI, pattern).keep_OI for swaps in (0, 50)
    )
    assert torch.equal(before.sum(1), after.sum(1)) and not torch.equal(before, after)


def test_sparseswaps_refits_its_own_mask() -> None:
    weight_OI, x_TI, pattern = weights(), correlated(400, INPUTS), Unstructured(0.5, "row")
    plain, fitted = (solved(methods.get("sparseswaps", {"refit": n}), weight_OI, x_TI, pattern) for n in (0, 20))
    assert torch.equal(plain.keep_OI, fitted.keep_OI)
    statistic = gram_of(x_TI)
    assert statistic.energy(weight_OI - fitted.weight_OI) < 0.9 * statistic.energy(weight_OI - plain.weight_OI)


@pytest.mark.parametrize("inputs", [100, 128, 200])
@pytest.mark.parametrize("pattern", [Unstructured(0.5, "layer"), Unstructured(0.5, "row"), NM(2, 4)], ids=repr)
def test_thanos_removes_each_block_of_a_row_jointly(inputs: int, pattern: Pattern) -> None:
    weight_OI, x_TI = weights(inputs=inputs), correlated(3 * inputs, inputs)
    expected_OI = oracle.thanos(weight_OI, gram_of(x_TI).hessian_II, pattern.keep, block=64)
    solution = solved(methods.get("thanos"), weight_OI, x_TI, pattern)
    assert torch.equal(solution.weight_OI != 0, expected_OI != 0)
    torch.testing.assert_close(solution.weight_OI.double(), expected_OI, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("remove", [2, 4, 6])
@pytest.mark.parametrize("seed", range(3))
def test_thanos_is_the_best_fit_on_its_mask_where_one_block_is_all(seed: int, remove: int) -> None:
    weight_OI, x_TI, pattern = (
        weights(outputs=16, inputs=8, seed=seed),
        correlated(64, 8, seed),
        Unstructured(remove / 8),
    )
    solution = solved(methods.get("thanos", {"damp": 1e-6}), weight_OI, x_TI, pattern)
    hessian_II = gram_of(x_TI).hessian_II.double()
    for row, keep, found in zip(weight_OI.double(), solution.keep_OI, solution.weight_OI, strict=True):
        torch.testing.assert_close(found.double(), oracle.best_fit(row, hessian_II, keep), rtol=1e-3, atol=1e-4)


def test_thanos_solves_what_float32_cannot_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two inputs that are nearly one: in fp32 their part of the inverse Hessian, Uᵀ U, is singular."""
    upper_II = torch.tensor([[1, 1, 0.5], [0, 1e-4, 0.3], [0, 0, 1]])
    weight_OI, gram = torch.tensor([[1, 1.0001, 9.0]]), gram_of(torch.eye(3))
    monkeypatch.setattr(gram, "factor", lambda damp: Factor(upper_II, torch.zeros(3, dtype=torch.bool), damp))
    solution = solved(Thanos(), weight_OI, torch.eye(3), Unstructured(0.67), statistic=gram)
    u_II, w_I = upper_II.double(), weight_OI[0].double()
    inverse_II = u_II.T @ u_II
    kept = w_I[2] - torch.linalg.solve(inverse_II[:2, :2], w_I[:2]) @ inverse_II[:2, 2]
    torch.testing.assert_close(solution.weight_OI, torch.tensor([[0, 0, float(kept)]]), rtol=1e-3, atol=0)
    upper_II[1, 1] = 0
    with pytest.raises(NumericalError, match=r"thanos: .* raise damp"):
        solved(Thanos(), weight_OI, torch.eye(3), Unstructured(0.67), statistic=gram)


def test_thanos_beats_sparsegpt_on_correlated_inputs() -> None:
    weight_OI, x_TI = weights(), correlated(400, INPUTS) @ correlated(INPUTS, INPUTS, 2)
    greedy = errors_of(methods.get("sparsegpt"), weight_OI, gram_of(x_TI), x_TI, Unstructured(0.6, "block")).sum()
    joint = errors_of(methods.get("thanos"), weight_OI, gram_of(x_TI), x_TI, Unstructured(0.6, "layer")).sum()
    assert joint < 0.95 * greedy


def shifted(tokens: int, inputs: int, seed: int) -> Tensor:
    """Inputs whose means differ from zero, as those of activations do."""
    return correlated(tokens, inputs, seed) + torch.randn(inputs, generator=torch.Generator().manual_seed(seed + 50))


@pytest.mark.parametrize(("pattern", "group"), [(Unstructured(0.5, "row"), 8), (NM(2, 4), 4)], ids=repr)
@pytest.mark.parametrize("threshold", [0.1, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_dsnot_makes_the_papers_exchanges(seed: int, threshold: float, pattern: Pattern, group: int) -> None:
    weight_OI, x_TI = weights(outputs=16, inputs=8, seed=seed), shifted(64, 8, seed)
    before_OI = solved(methods.get("wanda"), weight_OI, x_TI, pattern).keep_OI
    solution = solved(methods.get("dsnot", {"threshold": threshold}), weight_OI, x_TI, pattern)
    expected = [
        oracle.dsnot(row, x_TI.double(), keep, group, 50, threshold)
        for row, keep in zip(weight_OI.double(), before_OI, strict=True)
    ]
    assert solution.keep_OI.tolist() == [keep.tolist() for keep in expected]
    assert torch.equal(solution.weight_OI, weight_OI * solution.keep_OI)
    lost_O, lost_before_O = (((weight_OI * ~keep) @ x_TI.mean(0)).abs() for keep in (solution.keep_OI, before_OI))
    assert (lost_O <= lost_before_O).all() and lost_O.sum() < lost_before_O.sum()


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_ria_scores_weights_by_their_share_of_row_and_column(power: float) -> None:
    weight_OI, x_TI = weights(outputs=6, inputs=8), correlated(40, 8)
    size = weight_OI.abs().double().tolist()
    norms = [float(column.double().square().sum().sqrt()) for column in x_TI.T]
    solution = solved(methods.get("ria", {"power": power}), weight_OI, x_TI, Unstructured(0.5, "row"))
    for o, keep in enumerate(solution.keep_OI.tolist()):
        score = [
            (size[o][i] / sum(size[o]) + size[o][i] / sum(row[i] for row in size)) * norms[i] ** power for i in range(8)
        ]
        assert keep == [not gone for gone in oracle.remove_lowest(score, 4)]


def test_ria_survives_a_row_and_a_column_of_zeros() -> None:
    weight_OI = weights(outputs=6, inputs=8)
    weight_OI[2], weight_OI[:, 3] = 0, 0
    assert (
        not solved(methods.get("ria"), weight_OI, correlated(40, 8), Unstructured(0.5, "row")).keep_OI[[0, 1], 3].any()
    )


def test_obd_removes_the_least_increases_of_a_diagonal_hessian() -> None:
    weight_OI, x_TI = weights(outputs=6, inputs=8), correlated(40, 8)
    increase = (weight_OI.double().square() * x_TI.double().square().sum(0)).flatten().tolist()
    solution = solved(methods.get("obd"), weight_OI, x_TI, Unstructured(0.5, "layer"))
    assert solution.keep_OI.flatten().tolist() == [not gone for gone in oracle.remove_lowest(increase, 24)]


@pytest.mark.parametrize("seed", range(4))
def test_l2_normalised_magnitude_is_blind_to_the_scale_of_outputs(seed: int) -> None:
    weight_OI = weights(outputs=6, inputs=8, seed=seed) ** 3  # rows with few large weights: no norm is like another
    x_TI, pattern = correlated(40, 8), Unstructured(0.5, "layer")
    score = (weight_OI.double().abs() / weight_OI.double().norm(dim=1, keepdim=True)).flatten().tolist()
    solution = solved(methods.get("magnitude_l2"), weight_OI, x_TI, pattern)
    assert solution.keep_OI.flatten().tolist() == [not gone for gone in oracle.remove_lowest(score, 24)]
    scaled_OI = weight_OI * torch.tensor([1.0, 2, 4, 8, 16, 32])[:, None]
    assert torch.equal(solved(methods.get("magnitude_l2"), scaled_OI, x_TI, pattern).keep_OI, solution.keep_OI)


def test_taylor_keeps_what_changes_the_loss_most() -> None:
    weight_OI, x_TI = weights(outputs=6, inputs=8), correlated(40, 8)
    score_OI = torch.zeros(6, 8, dtype=torch.float64)
    for half in x_TI.double().chunk(2):
        leaf_OI = weight_OI.double().requires_grad_()
        ((half @ leaf_OI.T) ** 4).sum().div(4).backward()
        assert leaf_OI.grad is not None
        score_OI += (leaf_OI.detach() * leaf_OI.grad) ** 2
    solution = solved(methods.get("taylor"), weight_OI, x_TI, Unstructured(0.5, "layer"))
    assert solution.keep_OI.flatten().tolist() == [
        not gone for gone in oracle.remove_lowest(score_OI.flatten().tolist(), 24)
    ]


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


def test_the_files_are_the_methods() -> None:
    assert methods.names() == [
        "admm",
        "dsnot",
        "magnitude",
        "magnitude_l2",
        "obd",
        "random",
        "ria",
        "sparsegpt",
        "sparseswaps",
        "taylor",
        "thanos",
        "wanda",
    ]
    assert [methods.name_of(methods.get(name)) for name in methods.names()] == methods.names()


@pytest.mark.parametrize("name", methods.names())
def test_a_methods_declarations_agree(name: str) -> None:
    method = methods.get(name)
    assert method.comparison_group in method.comparison_groups
    assert set(method.comparison_groups) <= set(patterns.COMPARISON_GROUPS)
    assert method.needs in (None, ColumnNorm, ColumnMoments, Gram, Gradient)


@pytest.mark.parametrize(("name", "near"), [("wand", "wanda"), ("SparseGTP", "sparsegpt"), ("magnitud", "magnitude")])
def test_an_unknown_method_gets_the_nearest_name(name: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"unknown method '{name}': did you mean '{near}'"):
        methods.get(name)


def test_a_method_unlike_any_gets_them_all() -> None:
    with pytest.raises(
        RecipeError, match=r"known: admm, .*, magnitude, .*, sparsegpt, sparseswaps, taylor, thanos, wanda"
    ):
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
        ("sparsegpt", {"arithmetic": "fats"}, "unknown arithmetic 'fats': did you mean 'fast'"),
        ("ria", {"power": -1}, "power must be a number of at least 0, not -1.0"),
        ("admm", {"damp": -1}, "damp must be a number of at least 0, not -1.0"),
        ("admm", {"stages": 0}, "at least 1 stage, and an iteration for each, not 0 stages of 60 iterations"),
        ("admm", {"stages": 61}, "an iteration for each, not 61 stages of 60 iterations"),
        ("admm", {"first_rho": 2}, "rho must rise from above 0, not 2.0 to 1.0"),
        ("admm", {"refit": -1}, "refit must be at least 0, not -1"),
        ("thanos", {"damp": -1}, "damp must be a number of at least 0, not -1.0"),
        ("thanos", {"block_size": 0}, "block_size must be at least 1, not 0"),
        ("dsnot", {"cycles": -1}, "cycles must be at least 0, not -1"),
        ("dsnot", {"threshold": -1}, "threshold must be a number of at least 0, not -1.0"),
        ("sparseswaps", {"swaps": -1}, "swaps must be at least 0, not -1"),
        ("sparseswaps", {"candidates": 0}, "candidates must be at least 1, not 0"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        methods.get(name, options)
    assert message in str(error.value)
