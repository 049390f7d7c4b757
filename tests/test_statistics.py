"""Statistics: sums over calibration tokens, the energies they measure, and the factor of a damped Hessian."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from llmprune.errors import NumericalError
from llmprune.statistics import ColumnMoments, ColumnNorm, CrossGram, Gradient, Gram, gram
from llmprune.statistics.factor import factorize
from pretended_gpu import pretended_gpu

CPU = torch.device("cpu")
KINDS = [ColumnNorm, Gram]
Kind = type[ColumnNorm] | type[Gram]


def inputs(tokens: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


def fed(kind: Kind, *batches: Tensor, sequences: int = 1) -> ColumnNorm | Gram:
    statistic = kind(batches[0].shape[1], CPU)
    for batch in batches:
        statistic.add(batch, sequences)
    return statistic


def gram_of(x_TI: Tensor, sequences: int = 1) -> Gram:
    statistic = Gram(x_TI.shape[1], CPU)
    statistic.add(x_TI, sequences)
    return statistic


def positive(width: int, seed: int = 0) -> Tensor:
    x_TI = inputs(3 * width, width, seed)
    return x_TI.T @ x_TI


def damped(hessian_II: Tensor, damp: float) -> Tensor:
    return hessian_II + damp * hessian_II.diagonal().mean() * torch.eye(len(hessian_II))


def assert_undoes(upper_II: Tensor, hessian_II: Tensor) -> None:
    """H⁻¹ = Uᵀ U, so U H Uᵀ = 1."""
    product_II = upper_II.double() @ hessian_II.double() @ upper_II.double().T
    torch.testing.assert_close(product_II, torch.eye(len(upper_II), dtype=torch.float64), rtol=0, atol=1e-4)


def test_the_hessian_is_twice_the_mean_over_sequences() -> None:
    first, second = inputs(40, 12), inputs(24, 12, 1)
    statistic = Gram(12, CPU)
    statistic.add(first, 5)
    statistic.add(second, 3)
    x_TI = torch.cat([first, second]).double()
    torch.testing.assert_close(statistic.hessian_II.double(), 2 / 8 * x_TI.T @ x_TI, rtol=1e-5, atol=1e-5)
    assert (statistic.sequences, statistic.tokens) == (8, 64)


def test_moments_are_those_of_all_tokens() -> None:
    first, second = inputs(40, 12) + 1, inputs(24, 12, 1) - 3
    statistic, other = ColumnMoments(12, CPU), ColumnMoments(12, CPU)
    statistic.add(first, 5)
    other.add(second.bfloat16(), 3)
    statistic.merge(other)
    x_TI = torch.cat([first, second.bfloat16().float()])
    torch.testing.assert_close(statistic.mean_I, x_TI.mean(0))
    torch.testing.assert_close(statistic.variance_I, x_TI.var(0, correction=0), rtol=1e-4, atol=1e-4)


def test_moments_move_towards_others_per_token() -> None:
    own, other = inputs(10, 6) + 1, inputs(90, 6, 1)
    statistic, pooled = ColumnMoments(6, CPU), ColumnMoments(6, CPU)
    statistic.add(own, 1)
    pooled.add(other, 4)
    statistic.shrink(pooled, 0.25)
    square_I = 0.75 * own.square().mean(0) + 0.25 * other.square().mean(0)
    mean_I = 0.75 * own.mean(0) + 0.25 * other.mean(0)
    torch.testing.assert_close(statistic.mean_I, mean_I)
    torch.testing.assert_close(statistic.variance_I, square_I - mean_I.square(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(statistic.norm_I, square_I.sqrt())


def test_column_norms_are_those_of_the_mean_sequence() -> None:
    x_TI = inputs(60, 9)
    statistic = ColumnNorm(9, CPU)
    statistic.add(x_TI, 4)
    torch.testing.assert_close(statistic.norm_I, (x_TI.square().sum(0) / 4).sqrt())
    assert (statistic.sequences, statistic.tokens) == (4, 60)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 31, 32, 33, 50])
def test_tiles_of_a_gram_leave_no_gap(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(gram, "_GRAM_TILE", 16)
    monkeypatch.setattr(gram, "_MIRRORED_TILE", 16)
    x_TI = inputs(70, width)
    hessian_II = gram_of(x_TI).hessian_II
    torch.testing.assert_close(hessian_II, 2 * x_TI.T @ x_TI, rtol=1e-5, atol=1e-4)
    assert torch.equal(hessian_II, hessian_II.T)


def test_reading_a_gram_between_additions_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "_GRAM_TILE", 4)
    monkeypatch.setattr(gram, "_MIRRORED_TILE", 4)
    batches, weight_OI = [inputs(30, 10, seed) for seed in range(3)], inputs(3, 10, 9)
    quiet, read = Gram(10, CPU), Gram(10, CPU)
    for batch in batches:
        quiet.add(batch, 1)
        read.add(batch, 1)
        for damp in (0.01, 0.1):
            read.factor(damp)
        read.energy(weight_OI)
    read_whole, merged = gram_of(inputs(30, 10, 5)), gram_of(inputs(30, 10, 5))
    assert torch.equal(read.hessian_II, quiet.hessian_II)
    read_whole.factor(0.01)
    read_whole.merge(read)
    merged.merge(quiet)
    assert torch.equal(read_whole.hessian_II, merged.hessian_II)
    assert read_whole.energy(weight_OI) == merged.energy(weight_OI)


def test_the_real_tile_leaves_no_gap() -> None:
    x_TI = inputs(8, gram._GRAM_TILE + 3)
    torch.testing.assert_close(gram_of(x_TI).hessian_II, 2 * x_TI.T @ x_TI)


@pytest.mark.parametrize("kind", KINDS)
def test_merging_is_adding_all(kind: Kind) -> None:
    a, b, c = inputs(30, 20), inputs(50, 20, 1), inputs(7, 20, 2)
    whole, weight_OI = fed(kind, a, b, c), inputs(5, 20, 3)
    left, right = kind(20, CPU), kind(20, CPU)
    left.add(a, 1)
    for batch in (b, c):
        right.add(batch, 1)
    left.merge(right)  # type: ignore[arg-type]
    assert (left.sequences, left.tokens) == (whole.sequences, whole.tokens) == (3, 87)
    assert left.energy(weight_OI) == pytest.approx(whole.energy(weight_OI), rel=1e-5)


def test_merging_and_adding_forget_an_old_factor() -> None:
    statistic, more = gram_of(inputs(30, 8)), inputs(30, 8, 1)
    before = statistic.factor(0.01).upper_II
    statistic.add(more, 1)
    added = statistic.factor(0.01).upper_II
    statistic.merge(gram_of(more))
    merged = statistic.factor(0.01).upper_II
    assert not torch.equal(before, added) and not torch.equal(added, merged)


def test_gram_energy_is_the_squared_output_per_sequence() -> None:
    x_TI, change_OI = inputs(90, 20), inputs(11, 20, 1)
    truth = float((x_TI.double() @ change_OI.double().T).square().sum()) / 6
    statistic = Gram(20, CPU)
    statistic.add(x_TI, 6)
    assert statistic.energy(change_OI) == pytest.approx(truth, rel=1e-5)


def test_column_norm_energy_is_the_diagonal_of_the_grams() -> None:
    x_TI, change_OI = inputs(90, 20), inputs(11, 20, 1)
    truth = float((change_OI.double().square() * x_TI.double().square().sum(0)).sum()) / 6
    statistic = ColumnNorm(20, CPU)
    statistic.add(x_TI, 6)
    assert statistic.energy(change_OI) == pytest.approx(truth, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_fp32_whatever_the_inputs(kind: Kind, dtype: torch.dtype) -> None:
    x_TI = (300 + inputs(4096, 6)).to(dtype)  # the sum of squares is beyond fp16, each step of it below bf16's steps
    statistic, weight_OI = fed(kind, x_TI), torch.eye(6)
    truth = float(x_TI.double().square().sum())
    assert statistic.energy(weight_OI) == pytest.approx(truth, rel=1e-4)
    assert statistic.inputs == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_require_finite_names_the_site(kind: Kind, value: float) -> None:
    x_TI = inputs(5, 8)
    fed(kind, x_TI).require_finite("layer.3")
    x_TI[2, 7] = value
    with pytest.raises(NumericalError, match=r"^layer\.3: .*NaN or infinity"):
        fed(kind, x_TI).require_finite("layer.3")


@pytest.mark.parametrize("damp", [0.01, 0.1, 1.0])
@pytest.mark.parametrize("width", [1, 7, 40])
def test_the_factor_is_upper_triangular_and_that_of_the_damped_inverse(width: int, damp: float) -> None:
    hessian_II = positive(width)
    factor = factorize(hessian_II.clone(), damp)
    assert torch.equal(factor.upper_II, factor.upper_II.triu())
    assert_undoes(factor.upper_II, damped(hessian_II, damp))
    assert (factor.damp, factor.notes) == (damp, ()) and not factor.dead_I.any()


def test_dead_inputs_get_a_one_before_the_damping() -> None:
    x_TI = inputs(50, 6)
    x_TI[:, [1, 4]] = 0
    hessian_II = 2 * x_TI.T @ x_TI
    factor = gram_of(x_TI).factor(0.01)
    assert factor.dead_I.tolist() == [False, True, False, False, True, False]
    hessian_II[[1, 4], [1, 4]] = 1
    assert_undoes(factor.upper_II, damped(hessian_II, 0.01))


def test_the_damping_ladder_is_climbed_and_noted() -> None:
    indefinite_II = torch.diag(torch.tensor([10.0, 10.0, -0.5]))  # mean 6.5: 0.001 and 0.01 are too little, 0.1 does
    factor = factorize(indefinite_II, 0.001)
    assert factor.damp == pytest.approx(0.1)
    assert factor.notes == (
        "not positive definite at damping 0.001, raised to 0.01",
        "not positive definite at damping 0.01, raised to 0.1",
    )
    torch.testing.assert_close(factor.upper_II.diagonal().square(), 1 / torch.tensor([10.65, 10.65, 0.15]))


@pytest.mark.parametrize("damp", [0.0, 0.01])
def test_a_hopeless_matrix_is_an_error(damp: float) -> None:
    with pytest.raises(NumericalError, match="not positive definite even at damping"):
        factorize(torch.diag(torch.tensor([1.0, 1.0, -2.0])), damp)


def test_outputs_that_cancel_have_no_negative_energy() -> None:
    x_TI = inputs(1, 64)
    weight_OI = torch.randn(200, 64, generator=torch.Generator().manual_seed(2))
    weight_OI -= (weight_OI @ x_TI.T) @ x_TI / x_TI.square().sum()
    energy_O = gram_of(x_TI).energy_O(weight_OI)
    assert float(energy_O.min()) >= 0 and float(energy_O.max()) < 1e-4


def test_a_gram_is_factored_once_for_the_sites_that_share_it() -> None:
    statistic = gram_of(inputs(30, 8))
    first = statistic.factor(0.01)
    assert statistic.factor(0.01) is first
    assert statistic.factor(0.1).damp == 0.1


def test_damping_by_tokens() -> None:
    statistic = gram_of(inputs(40, 8))
    assert statistic.damping(0.01, 0.0) == 0.01
    assert statistic.damping(0.01, 0.5) == pytest.approx(0.01 + 0.5 * 8 / 40)
    assert gram_of(inputs(2, 8)).damping(0.01, 0.5) == pytest.approx(0.51)  # as if there were a token for each input
    assert Gram.from_matrix(torch.eye(8)).damping(0.01, 0.5) == 0.01  # of how many tokens is not known


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_target_solves_the_ridge_problem_towards_both_models(share: float) -> None:
    """min |G Wᵀ - P W*ᵀ|² + λ |W* - W|² with the mixed goal G Wᵀ, solved by stacking the ridge under the inputs."""
    torch.manual_seed(0)
    pruned, dense, weight_OI = torch.randn(3, 7, 5), torch.randn(3, 7, 5), torch.randn(4, 5)
    statistic = CrossGram(5, CPU)
    for x, d in zip(pruned, dense, strict=True):
        statistic.add(x, 1, d)
    p, d = (x.reshape(-1, 5).double() * (2 / 3) ** 0.5 for x in (pruned, dense))
    root = (0.1 * (p.T @ p).diagonal().mean()).sqrt() * torch.eye(5, dtype=torch.float64)
    goal = (share * d + (1 - share) * p) @ weight_OI.double().T
    expected = torch.linalg.lstsq(torch.cat([p, root]), torch.cat([goal, root @ weight_OI.double().T])).solution.T
    assert torch.allclose(
        statistic.target(weight_OI, share, 0.1).double(), expected if share else weight_OI.double(), atol=1e-4
    )


def test_infinite_inputs_of_the_dense_model_are_named() -> None:
    statistic, dense_TI = CrossGram(5, CPU), torch.randn(20, 5)
    dense_TI[3, 2] = torch.inf
    statistic.add(torch.randn(20, 5), 1, dense_TI)
    with pytest.raises(NumericalError, match="the dense model's part of a site: its calibration inputs hold NaN"):
        statistic.require_finite("a site")


def test_a_target_by_itself_trusts_the_dense_inputs_the_more_tokens_there_are() -> None:
    statistic, weight_OI = CrossGram(5, CPU), torch.randn(4, 5)
    shares = [statistic.share("auto")]
    for _ in range(3):
        statistic.add(torch.randn(20, 5), 1, torch.randn(20, 5))
        shares.append(statistic.share("auto"))
        assert torch.equal(statistic.target(weight_OI, "auto", 0.01), statistic.target(weight_OI, shares[-1], 0.01))
    assert shares == pytest.approx([0, 0.7 * 20 / 60, 0.7 * 40 / 80, 0.7 * 60 / 100])


@pytest.mark.parametrize("rows", [3, 40])  # fewer than inputs, and more
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_gpu_finds_the_same_target_by_a_correction(share: float, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pruned, dense = torch.randn(2, 200, 20, generator=generator)
    weight_OI, found = torch.randn(rows, 20, generator=generator), []
    for device in ("cpu", "cuda"):
        with pretended_gpu() if device == "cuda" else nullcontext():
            statistic = CrossGram(20, torch.device(device))
            statistic.add(pruned.to(device), 1, (pruned + 0.1 * dense).to(device))
            found.append(statistic.target(weight_OI.to(device), share, 0.01).cpu())
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-4
    assert torch.equal(found[1], weight_OI) is (share == 0)


def test_without_a_change_of_the_inputs_the_target_on_a_gpu_is_the_weight_itself() -> None:
    with pretended_gpu():
        statistic = CrossGram(20, torch.device("cuda"))
        x_TI = torch.randn(200, 20).bfloat16().to("cuda")
        statistic.add(x_TI, 1, x_TI)
        weight_OI = torch.randn(30, 20).to("cuda")
        assert torch.equal(statistic.target(weight_OI, 0.5, 0.01).cpu(), weight_OI.cpu())


@pytest.mark.parametrize(
    "change",
    [
        CrossGram.forget_factors,
        lambda statistic: statistic.move(torch.device("meta")),
        lambda statistic: statistic.add(torch.randn(9, 5), 1, torch.randn(9, 5)),
        lambda statistic: statistic.merge(gram_of(torch.randn(9, 5))),
        lambda statistic: statistic.shrink(gram_of(torch.randn(9, 5)), 0.5),
    ],
    ids=["forget", "move", "add", "merge", "shrink"],
)
def test_nothing_that_was_computed_from_sums_outlives_them(change: Callable[[CrossGram], None]) -> None:
    statistic = CrossGram(5, CPU)
    statistic.add(torch.randn(9, 5), 1, torch.randn(9, 5))
    statistic.target(torch.randn(4, 5), 0.5, 0.01)
    assert statistic._made and statistic._factors
    change(statistic)
    assert not statistic._made and not statistic._factors


@pytest.mark.parametrize("of_weights", [True, False])
def test_all_of_a_gradient_moves_to_another_device(of_weights: bool) -> None:
    statistic = Gradient(4, 5, CPU, of_weights)
    statistic.add(torch.randn(9, 5), torch.randn(9, 4))
    statistic.close_sequence()
    statistic.move(torch.device("meta"))
    held = [value for value in vars(statistic).values() if isinstance(value, torch.Tensor)] + statistic.open
    assert len(held) == (4 if of_weights else 2)
    assert statistic.device.type == "meta" and all(value.is_meta for value in held)


def test_without_the_dense_models_inputs_the_target_is_the_weight_itself() -> None:
    statistic = CrossGram(5, CPU)
    statistic.add(torch.randn(9, 5), 1)
    weight_OI = torch.randn(4, 5)
    assert torch.equal(statistic.target(weight_OI, 0.5, 0.01), weight_OI)


def test_the_two_kinds_of_factor_are_inverses() -> None:
    statistic = gram_of(inputs(60, 20))
    upper_II, root_II = statistic.factor(0.01).upper_II, statistic.factor(0.01, "root").upper_II
    assert torch.equal(root_II, root_II.triu())
    torch.testing.assert_close(upper_II @ root_II, torch.eye(20), rtol=0, atol=1e-5)
    torch.testing.assert_close(root_II @ root_II.T, statistic.damped_II(0.01), rtol=1e-5, atol=1e-4)


def test_the_damping_ladder_is_the_same_for_both_kinds() -> None:
    indefinite_II = torch.diag(torch.tensor([10.0, 10.0, -0.5]))
    inverse, root = (factorize(indefinite_II, 0.001, kind) for kind in ("inverse", "root"))
    assert (inverse.damp, inverse.notes) == (root.damp, root.notes)
